"""The interface between a rollout engine and those who use it, and the records that pass through it.

An engine draws completions by continuous batching: requests come at any time, and every `step` returns the next tokens.
`Engine` is all that the output processor, the server, evaluation and the rollout workers know of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from lockstep.data.batch import Experts
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.grammar import Grammar

if TYPE_CHECKING:  # torch and megatron-core, which a driver has no use for
    from lockstep.rl.weight_sync.protocol import Shard


OnOverflow = Literal["error", "truncate", "roll"]
"""What becomes of a request whose prompt and completion are longer than the engine allows: it is refused (`error`); its
prompt loses its first tokens, until both fit (`truncate`); or each token is drawn from what the model says behind the
last Δ tokens alone, where Δ is the length allowed (`roll`: x_{t+1} ~ p(· | x_{t−Δ+1..t}), equation 10 of
arXiv:2602.00426). A window that rolls is computed again for each token, because its first position is always 0."""


class PromptTooLong(ValueError):
    """A prompt that leaves no room for a completion."""


@dataclass(frozen=True)
class Statistics:
    """Requests and cache blocks at one moment, and counts of tokens and preemptions since the engine began."""

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
    proposed_tokens: int = 0
    """Tokens that were computed on trial, by prompt-lookup speculation."""
    accepted_tokens: int = 0
    """Those of them that the model then drew."""


@dataclass(frozen=True)
class Request:
    """A request for one completion of one prompt."""

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
    prompt_logprobs: int | None = None
    """Report the prompt's log-probabilities, with this many of the likeliest tokens at each place; None: do not."""
    draws: bool = True
    """Whether tokens are drawn; a request that draws none ends when its prompt has been computed."""
    on_overflow: OnOverflow = "error"
    """What becomes of it where prompt and completion are too long."""
    grammar: Grammar | None = None
    """What its new tokens are written in; it may end only where the grammar may, and ends where that cannot go on."""

    @property
    def new(self) -> int:
        """The most tokens that may be drawn."""
        return self.sampling.longest if self.draws else 0


@dataclass(frozen=True)
class TokenOutput:
    """One token of a completion."""

    key: str | int
    token: int
    logp: float
    """Under the policy: with the temperature, over the whole vocabulary (at temperature 0 the policy at 1), in nats."""
    sampling_logp: float
    """Under the distribution that it was drawn from, truncation, penalties and grammar included; 0 without a choice."""
    weight_version: int
    finish_reason: str | None = None
    """With the last token: `stop` where the model or a stop string ended it, `length` where the limit did."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities under the policy, where the request asks for `logprobs`."""
    support: tuple[int, ...] = ()
    """Tokens among which it was drawn, in order, where the request asks for `support` and something was cut off."""
    experts: Experts | None = field(default=None, compare=False)
    """With the last token, from an engine that records them: see `Completion`."""


@dataclass(frozen=True)
class Score:
    """A token of a prompt with its log-probability under the policy, given those before it."""

    token: int
    logp: float | None
    """As `TokenOutput.logp`; None for the first, which nothing stands before."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its place and their log-probabilities, where the request asks for some."""


@dataclass(frozen=True)
class PromptOutput:
    """What a request reports when its prompt has been computed, before its first token."""

    key: str | int
    scores: tuple[Score, ...]
    """Of each token of the prompt, where the request asks for `prompt_logprobs`."""
    finish_reason: str | None = None
    """`length` where the request draws no tokens."""


@dataclass(frozen=True)
class FailedOutput:
    """The end of a request that could not be computed; it costs no other request anything."""

    key: str | int
    reason: str
    finish_reason: str = "error"


Output = TokenOutput | PromptOutput | FailedOutput

Clause = Literal["exact", "isolated_passes", "frees_memory", "tensor_ranks"]
"""What an implementation may say that it does not keep:

- `exact`: in exact numerics log-probabilities are the trainer's bits, and in fast ones the trainer's up to rounding of
  the same operations; importance ratios begin at 1.
- `isolated_passes`: a request that has a whole pass raise ends alone, with a `FailedOutput`; otherwise `step` raises.
- `frees_memory`: `release` gives memory back to the device.
- `tensor_ranks`: one model may be split over several engines.
"""


class Engine(Protocol):
    """A language model that completes prompts, whose weights can be replaced while requests run.

    Training relies on what an implementation has to keep:

    - `TokenOutput.logp` is under the policy: softmax(logits / temperature) over the whole vocabulary (at temperature 0
      the policy at 1), without penalties, bias and truncation. `sampling_logp` is under the distribution that the token
      was drawn from.
    - Every token carries the version of the weights that drew it. Weights change in `end_update` only, and nothing
      that was computed under old weights is found by requests that begin after it.
    - The random number of a token depends on (seed, sample, position) only, and so does a completion, up to rounding:
      it does not depend on the batch, on other requests, or on when it was added.
    - A request ends with exactly one output that has a finish reason, or by `cancel`; `holds` is true until then.
    - A request whose tokens cannot be computed, drawn or decoded ends with a `FailedOutput`. Other requests get the
      tokens, and the bits, that they get without it; where it had a whole pass raise, and they are computed again, in
      fast numerics the bits up to rounding.
    - Tensor ranks of one model each have an engine; they make the same calls and return the same tokens.
    - One thread uses an engine at a time; only `statistics` may be read from others.

    tests/rl/rollout/test_protocol.py is the suite that every implementation passes; `exceptions` says what one of them
    does not keep.
    """

    exceptions: frozenset[Clause]
    """Clauses that the implementation does not keep."""

    @property
    def weight_version(self) -> int:
        """The version of the weights that draw the next tokens, 0 before the first update."""

    @property
    def has_work(self) -> bool:
        """Whether a request has neither ended nor been cancelled."""

    @property
    def statistics(self) -> Statistics:
        """Requests, cache and tokens at this moment."""

    @property
    def longest(self) -> int:
        """The most tokens that prompt and completion together may have: context and cache have room for them."""

    def decode(self, tokens: list[int], /) -> str:
        """The text of tokens, without special ones."""

    def check(self, request: Request) -> None:
        """Refuse a request that can never run.

        Raises:
            PromptTooLong: when prompt and completion do not fit into the context or the cache.
            ValueError: when the prompt is empty or a token is not in the vocabulary.
        """

    def add(self, request: Request) -> None:
        """Queue a request, which runs as soon as there is room.

        Raises:
            PromptTooLong, ValueError: as `check`; also when a running request has the same key.
        """

    def cancel(self, key: str | int) -> None:
        """Abort a request: `step` returns no more of its tokens. One that has ended or was never added is no error."""

    def holds(self, key: str | int) -> bool:
        """Whether a request was added and has neither ended nor been cancelled."""

    def step(self) -> list[Output]:
        """Run one forward pass; returns the tokens that it drew, prompts and failures.

        Several tokens of one request stand in the order of their places.

        After an error no request is lost: the next step computes again what was running.

        Raises:
            RuntimeError: between `begin_update` and `end_update`, or after `release` of the weights.
        """

    def agree(self, number: int) -> int:
        """The number of the first tensor rank, on all of them, which call this together."""

    def ready_for_update(self) -> bool:
        """Whether `begin_update` may be called; where running requests have to end before it (`OnUpdate`), call `step`
        until they have. Requests that wait then begin after the update only."""

    def begin_update(self, version: int) -> None:
        """Begin to replace all weights.

        Raises:
            RuntimeError: unless `ready_for_update`.
        """

    def take(self, shards: "Sequence[Shard]") -> None:
        """Write a part of the new weights; shards may come from any layout, in messages of any size.

        Raises:
            WeightsDiffer: when bits differ from those that the policy signed, or a part comes twice.
        """

    def end_update(self) -> None:
        """Use the new weights from the next `step` on; `weight_version` is theirs.

        Raises:
            WeightsDiffer: when a part is missing.
        """

    def weights_digest(self) -> str:
        """Digest of this rank's weights: equal where all bits are equal."""

    def forget(self) -> None:
        """Empty the prefix cache: no request finds what earlier ones have computed."""

    def release(self, *, weights: bool = False) -> None:
        """Free the memory of the KV cache; running requests are computed again when they go on.

        Args:
            weights: free that of the weights as well; an update has to come before the next `step`.
        """
