"""From requests to rows of the sampler, and from what it draws to what engines report, whoever computed the logits."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.model.config import ModelConfig
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.protocol import TokenOutput
from lockstep.rl.rollout.requests import finish_reason
from lockstep.rl.rollout.sampling.sampler import Draw, Row, likeliest, uniforms
from lockstep.rl.rollout.scheduling.plan import Place, SequenceState


@dataclass(frozen=True)
class Drawn:
    """A drawn token, with what `TokenOutput` reports of it."""

    token: int
    logp: float
    sampling_logp: float
    top: tuple[tuple[int, float], ...]
    support: tuple[int, ...]


class EndTokens:
    """Tokens that end a completion: the model's own end tokens, and those of the request."""

    def __init__(self, model: ModelConfig) -> None:
        self.vocabulary = model.vocabulary
        self._own = tuple(token for token in model.eos_tokens if 0 <= token < model.vocabulary)

    def __call__(self, sampling: SamplingParams) -> tuple[int, ...]:
        """The end tokens of a request with this sampling."""
        return (*self._own, *sampling.stop_tokens)


def rows_of(places: Sequence[Place], ends: EndTokens) -> list[Row]:
    """A row of the sampler for each place."""
    requests = [place.request for place in places]
    positions = [place.request.begun + len(place.tokens) for place in places]
    numbers = uniforms([r.seed for r in requests], [r.sample for r in requests], positions)
    return [_row(place, number, ends) for place, number in zip(places, numbers.tolist(), strict=True)]


def _row(place: Place, number: float, ends: EndTokens) -> Row:
    request, tokens, grammar = place.request, place.tokens, place.grammar
    early = len(tokens) < request.sampling.min_new_tokens
    forbidden = ends(request.sampling) if early and not request.sampling.exact_lengths else ()
    begun = request.tokens[len(request.tokens) - request.begun :]
    allowed = None if grammar is None else grammar.allowed(ends(request.sampling), ends.vocabulary)
    return Row(request.sampling, number, request.tokens, [*begun, *tokens] if begun else tokens, forbidden, allowed)


def reported(
    rows: Sequence[Row],
    draw: Draw,
    failed: dict[int, Exception],
    whole_BV: Tensor,
    policy: tuple[Tensor, Tensor],
) -> list[Drawn | Exception]:
    """What each row reports of its draw, or the error that stands in its place.

    Args:
        failed: as `draw_isolated` returns it.
        whole_BV: logits of the whole vocabulary.
        policy: log-probabilities of the drawn tokens under the policy and the log-sum-exp below them, [B] each.
    """
    logp, log_sums = policy
    sampling_logp = torch.where(draw.sampling_logp.isnan(), logp, draw.sampling_logp)
    top = [
        likeliest(whole, log_sum, row) if row.sampling.logprobs else ()
        for whole, log_sum, row in zip(whole_BV, log_sums, rows, strict=True)
    ]
    columns = draw.tokens.tolist(), logp.tolist(), sampling_logp.tolist(), top, draw.supports
    return [failed.get(i) or Drawn(*each) for i, each in enumerate(zip(*columns, strict=True))]


def next_token(
    sequence: SequenceState, drawn: Drawn | Exception, ends: Collection[int], weight_version: int
) -> TokenOutput:
    """Add a drawn token to its sequence; raises what stands in its place.

    Args:
        ends: tokens that end the completion.
    """
    if isinstance(drawn, Exception):
        raise drawn
    sequence.tokens.append(drawn.token)
    said = drawn.token, drawn.logp, drawn.sampling_logp, weight_version
    reason = finish_reason(sequence.request, sequence.tokens, sequence.stops, ends)
    if sequence.grammar is not None and drawn.token not in ends and sequence.grammar.take(drawn.token):
        reason = "stop"
    return TokenOutput(sequence.request.key, *said, reason, drawn.top, drawn.support)
