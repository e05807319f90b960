"""The order in which groups are written and learned from, and how old the weights behind a sample may be.

Groups are learned from in the order in which they were asked for, B at least in each step. With a bound of S versions a
group is asked for only where fewer than r + S · B groups are before it: the r that the step at hand still takes, and S
steps more. So it is learned from S versions later at most: no sample is ever too old, and none is thrown away for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lockstep.rl.algorithms.config import FlowConfig
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.types import Prompt, Scored


class Source(Protocol):
    """Where groups come from: see `Producer`."""

    @property
    def version(self) -> int:
        """Of the weights that completions are written with."""

    def ask(self, prompts: Mapping[int, Prompt], sampling: SamplingParams, samples: int, seed: int) -> None:
        """Ask for groups by their numbers."""

    def take(self, group: int) -> list[Scored]:
        """A group that was asked for, when it is there."""


@dataclass(frozen=True)
class Batch:
    """What a step learns from."""

    groups: tuple[tuple[Scored, ...], ...]
    """In the order in which they were asked for; those that were replaced, too."""
    replaced: int
    """Groups that teach nothing, in whose place others were asked for."""
    staleness: tuple[int, ...]
    """Of each completion: versions between the oldest weights that wrote any of it and those that learn from it."""


class BatchScheduler:
    """Batches of complete groups, in order."""

    def __init__(
        self,
        source: Source,
        prompt: Callable[[int], Prompt],
        flow: FlowConfig,
        *,
        groups: int,
        samples: int,
        sampling: SamplingParams,
        seed: int,
        compare: Callable[[Sequence[Scored]], list[Scored]],
        teaches: Callable[[Sequence[Scored]], bool],
        first: int = 0,
    ) -> None:
        """
        Args:
            prompt: of each group, by its number.
            groups: of a step.
            samples: completions of a group.
            compare: a group with its advantages.
            teaches: whether such a group has anything to learn from.
            first: number of the first group.
        """
        self._source, self._prompt, self._flow, self._compare = source, prompt, flow, compare
        self._teaches = teaches
        self._groups, self._samples, self._sampling, self._seed = groups, samples, sampling, seed
        self._most = int(flow.most * groups) if flow.dynamic_sampling else groups
        self._asked = self.position = first
        """Number of the next group to be taken, which is all that a run has to remember to go on."""

    def batch(self) -> Batch:
        """The groups of the next step, when they are there; the next ones are asked for."""
        taken: list[tuple[Scored, ...]] = []
        replaced = 0
        while left := min(self._groups + replaced, self._most) - len(taken):
            self._ask(left)
            group = tuple(self._compare(self._source.take(self.position)))
            self.position += 1
            replaced += self._flow.dynamic_sampling and not self._teaches(group)
            taken.append(group)
        self._ask(0)
        return Batch(tuple(taken), replaced, self._staleness(taken))

    def _ask(self, left: int) -> None:
        """Ask for as many groups as may be open, where so many are still to be taken for this step."""
        open_ = self._asked - self.position
        room = self._flow.staleness * self._groups + left - open_
        if self._flow.in_waves:
            room = 0 if open_ else min(room, left or self._groups)
        numbers = range(self._asked, self._asked + max(0, room))
        self._source.ask({n: self._prompt(n) for n in numbers}, self._sampling, self._samples, self._seed)
        self._asked = numbers.stop

    def _staleness(self, taken: Sequence[Sequence[Scored]]) -> tuple[int, ...]:
        version = self._source.version
        found = tuple(version - s.rollout.weight_version for group in taken for s in group)
        assert max(found) <= self._flow.staleness
        return found
