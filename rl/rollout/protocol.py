"""Engine (protocol), Request, TokenOutput."""

from dataclasses import dataclass

from lockstep.rl.rollout.config import SamplingParams


class PromptTooLong(ValueError):
    """A prompt that leaves no room for a completion."""


@dataclass(frozen=True)
class Statistics:
    """What an engine is doing, and has done since it began."""

    running: int
    waiting: int
    blocks_used: int
    blocks_free: int
    prompt_tokens: int
    """Tokens of prompts that were asked for."""
    cached_prompt_tokens: int
    """Those of them that another request had left in the cache."""
    generated_tokens: int
    preemptions: int


@dataclass(frozen=True)
class Request:
    """One completion of one prompt."""

    key: str | int
    """The caller's name for it, which its tokens carry."""
    tokens: tuple[int, ...]
    """The prompt."""
    sampling: SamplingParams
    seed: int
    sample: int
    """Number that together with the seed and the position decides what is drawn."""
    begun: int = 0
    """The last so many of the tokens are the completion's beginning; positions count from there."""


@dataclass(frozen=True)
class TokenOutput:
    """One token of a completion."""

    key: str | int
    token: int
    logp: float
    """Under the policy: with the temperature, over the whole vocabulary (at temperature 0 the policy at 1), in nats."""
    sampling_logp: float
    """Under the distribution that it was drawn from, penalties and truncation included; 0 where it had no choice."""
    weight_version: int
    finish_reason: str | None = None
    """With the last token: `stop` where the model or a stop string ended it, `length` where the limit did."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities under the policy, where the request asks for `logprobs`."""
    support: tuple[int, ...] = ()
    """Tokens among which it was drawn, in order, where the request asks for `support` and something was cut off."""
