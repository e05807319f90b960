"""The work of one forward pass: chunks of sequences, and sequences that share what a chunk computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lockstep.data.batch import Experts
from lockstep.rl.rollout.detokenizer import StopStrings
from lockstep.rl.rollout.grammar import GrammarState
from lockstep.rl.rollout.protocol import Request, Score
from lockstep.rl.rollout.scheduling.prompt_lookup import PromptLookup


@dataclass(eq=False)
class SequenceState:
    """A request while it waits or runs: its tokens so far, and its blocks of the KV cache."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    """Of the completion."""
    passed: int = 0
    """Tokens that its window has left behind (see `OnOverflow`): no pass computes them any more."""
    cached: int = 0
    """Tokens, from the window's first on, whose keys and values are in the cache."""
    tables: list[list[int]] = field(default_factory=list)
    """For each kind of layer the block of each BLOCK tokens; −1 where it has been given back."""
    names: list[bytes] = field(default_factory=list)
    """Hashes of the text's full blocks (see `block_pool.chained`), as far as they have been needed."""
    stops: StopStrings | None = None
    grammar: GrammarState | None = None
    scores: list[Score] | None = None
    """Of the prompt's tokens that have been computed; None where none are asked for, or all have been reported."""
    lookup: PromptLookup = field(default_factory=PromptLookup)
    experts: list[Experts] = field(default_factory=list)
    """Of its tokens from the prompt's first on, [N, L, K] in parts, where they are recorded; see `RoutingRecord`."""
    recorded: int = 0
    """Number of tokens whose experts these are."""

    @property
    def known(self) -> int:
        """Number of tokens of prompt and completion that are in its window."""
        return len(self.request.tokens) + len(self.tokens) - self.passed

    def part(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens start … stop−1 of the window; without one that rolls, of prompt and completion."""
        prompt = self.request.tokens
        start, stop = start + self.passed, stop + self.passed
        if stop <= len(prompt):
            return prompt[start:stop]
        return (*prompt[start:], *self.tokens[max(0, start - len(prompt)) : stop - len(prompt)])


Failures = dict[SequenceState, Exception]
"""Sequences that cannot go on, and why."""


@dataclass(frozen=True)
class Chunk:
    """Tokens start … start+count−1 of a sequence, which one pass computes."""

    sequence: SequenceState
    start: int
    count: int
    ends: bool
    """Whether it is computed with all tokens of the sequence, so that the next one can be drawn."""
    proposed: tuple[int, ...] = ()
    """Tokens that are computed behind them on trial; they count as far as they are then drawn (see `PromptLookup`)."""

    @property
    def length(self) -> int:
        """Tokens that the pass computes."""
        return self.count + len(self.proposed)

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the pass computes."""
        return (*self.sequence.part(self.start, self.start + self.count), *self.proposed)

    @property
    def decodes(self) -> bool:
        """Whether it is the last token of a completion, behind which the next one is drawn."""
        return self.draws and self.count == 1 and bool(self.sequence.tokens)

    @property
    def draws(self) -> bool:
        """Whether the next token is drawn after it."""
        return self.ends and self.sequence.request.draws


@dataclass(frozen=True)
class Place:
    """A place of a completion whose token is drawn."""

    request: Request
    tokens: Sequence[int]
    """Of the completion, before it."""
    grammar: GrammarState | None = None
    """Behind these tokens."""


@dataclass(frozen=True)
class Fork:
    """A sequence that shares the prompt of another in the same pass, and draws its first token from the same logits."""

    sequence: SequenceState
    source: Chunk
    copies: tuple[tuple[int, int] | None, ...]
    """For each kind of layer the block to be copied after the pass, and where to; None where blocks end together."""


@dataclass
class Plan:
    """The work of one forward pass."""

    chunks: list[Chunk] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)

    @property
    def drawing(self) -> list[tuple[SequenceState, tuple[int, ...]]]:
        """Sequences that draw after the pass, those of chunks before those of forks, with the tokens on trial.

        One token is drawn in the place of each token on trial, and one behind all.
        """
        of_chunks = [(chunk.sequence, chunk.proposed) for chunk in self.chunks if chunk.draws]
        return of_chunks + [(fork.sequence, ()) for fork in self.forks]

    @property
    def rows(self) -> list[Place]:
        """The places of all tokens that are drawn."""
        return [
            Place(sequence.request, [*sequence.tokens, *proposed[:n]] if n else sequence.tokens, sequence.grammar)
            for sequence, proposed in self.drawing
            for n in range(len(proposed) + 1)
        ]
