"""A completion that is wanted, the request for it, what comes out of it token by token, and its state in between."""

from dataclasses import dataclass, field

from lockstep.rl.rollout.sampling import SamplingConfig
from lockstep.rl.rollout.stopping import StopStrings
from lockstep.rl.types import Prompt, Rollout


@dataclass(frozen=True)
class Request:
    """One completion of one prompt."""

    key: str | int
    """The caller's name for it, which its tokens carry."""
    tokens: tuple[int, ...]
    """The prompt."""
    sampling: SamplingConfig
    seed: int
    sample: int
    """Number that together with the seed and the position decides what is drawn."""
    begun: int = 0
    """The last so many of the tokens are the completion's beginning; positions count from there."""


@dataclass(frozen=True)
class Order:
    """A completion that is wanted."""

    number: int
    """Its name; with the seed and the position it decides what is drawn."""
    prompt: Prompt
    sampling: SamplingConfig
    seed: int
    begun: Rollout | None = None
    """What there is of it already, of earlier turns and their answers; behind that it goes on."""

    @property
    def request(self) -> Request:
        """What the engine is asked for."""
        if self.begun is None:
            return Request(self.number, self.prompt.tokens, self.sampling, self.seed, self.number)
        before, limits = len(self.begun.tokens), self.sampling
        left = {
            "max_new_tokens": limits.max_new_tokens - before,
            "min_new_tokens": max(0, limits.min_new_tokens - before),
        }
        tokens = self.prompt.tokens + self.begun.tokens
        return Request(self.number, tokens, limits.model_copy(update=left), self.seed, self.number, before)


@dataclass(frozen=True)
class Token:
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


@dataclass(eq=False)
class Sequence:
    """A completion while it is being written; the only thing in a rollout that changes."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    """Of the completion."""
    cached: int = 0
    """Tokens, from the prompt's first on, whose keys and values are in the cache."""
    tables: list[list[int]] = field(default_factory=list)
    """For each kind of layer the block of each BLOCK tokens; −1 where it has been given back."""
    names: list[bytes] = field(default_factory=list)
    """Of what the text's full blocks hold, as far as they have been needed."""
    stops: StopStrings | None = None

    @property
    def known(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.request.tokens) + len(self.tokens)

    def part(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens start … stop−1 of prompt and completion."""
        prompt = self.request.tokens
        if stop <= len(prompt):
            return prompt[start:stop]
        return (*prompt[start:], *self.tokens[max(0, start - len(prompt)) : stop - len(prompt)])
