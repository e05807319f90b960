"""Scores of prompts from vLLM's `prompt_logprobs`, which know no temperature: with one, from those of all tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lockstep.rl.rollout.protocol import Request, Score


def asked_of_vllm(request: Request, vocabulary: int) -> int | None:
    """How many likeliest tokens vLLM is to report for each place of a prompt; −1 for all, None for no scores."""
    if request.prompt_logprobs is None:
        return None
    return min(request.prompt_logprobs, vocabulary) if request.sampling.temperature in (0, 1) else -1


def scores(request: Request, found: Sequence[Mapping[int, Any] | None]) -> tuple[Score, ...]:
    """The scores of a prompt's tokens.

    Args:
        found: for each place vLLM's `Logprob`s by tokens, those of the prompt's own token and of the likeliest.
    """
    later = zip(request.tokens[1:], found[1:], strict=True)
    return (Score(request.tokens[0], None), *(_score(request, token, place) for token, place in later))


def _score(request: Request, token: int, place: Mapping[int, Any] | None) -> Score:
    assert place is not None
    tokens = sorted(place, key=lambda each: (-place[each].logprob, each))
    logp = torch.tensor([place[each].logprob for each in tokens])
    temperature = request.sampling.temperature or 1.0
    if temperature != 1:
        logp = (logp / temperature).log_softmax(-1)
    by_token = dict(zip(tokens, logp.tolist(), strict=True))
    return Score(token, by_token[token], tuple(by_token.items())[: request.prompt_logprobs])
