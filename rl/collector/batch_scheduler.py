"""Schedules groups of rollouts into batches, in order, and bounds how stale the weights behind a sample may be.

Groups are learned from in the order in which they were asked for, B at least in each step. With a bound of S versions a
group is asked for only where fewer than r + S · B groups are before it: the r that the step at hand still takes, and S
steps more. So it is learned from S versions later at most: no sample is ever too old, and none is thrown away for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lockstep.rl.algorithms.config import FlowConfig
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.types import Judged, Prompt, Rewarded


class Source(Protocol):
    """Where judged groups come from: see `lockstep.rl.collector.collector.Collector`."""

    @property
    def version(self) -> int:
        """The version of the weights that completions are written with."""

    def ask(self, prompts: Mapping[int, Prompt], sampling: SamplingParams, samples: int, seed: int) -> None:
        """Requests groups of completions, by their numbers."""

    def take(self, group: int) -> list[Judged]:
        """Waits for a requested group."""


@dataclass(frozen=True)
class Batch:
    """The groups of rollouts that a step learns from."""

    groups: tuple[tuple[Rewarded, ...], ...]
    """In the order in which they were asked for; those that were replaced, too."""
    teaching: tuple[bool, ...]
    """Whether each of them has anything to learn from."""
    replaced: int
    """Groups that teach nothing, in whose place others were asked for."""
    staleness: tuple[int, ...]
    """Of each completion: versions between the oldest weights that wrote any of it and those that learn from it."""


class BatchScheduler:
    """Makes batches of complete groups, in the order in which they were requested."""

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
        reward: Callable[[Sequence[Sequence[Judged]]], Sequence[tuple[Rewarded, ...]]],
        teaches: Callable[[Sequence[Rewarded]], bool],
        first: int = 0,
    ) -> None:
        """
        Args:
            prompt: of each group, by its number.
            groups: of a step.
            samples: completions of a group.
            reward: gives groups their rewards; it may wait for a reward model meanwhile.
            teaches: whether such a group has anything to learn from.
            first: number of the first group.
        """
        self._source, self._prompt, self._flow = source, prompt, flow
        self._reward, self._teaches = reward, teaches
        self._groups, self._samples, self._sampling, self._seed = groups, samples, sampling, seed
        self._most = int(flow.most * groups) if flow.dynamic_sampling else groups
        self._asked = self.position = first
        """Number of the next group to be taken, which is all that a run has to remember to go on."""

    def batch(self) -> Batch:
        """Waits for the groups of the next step, and requests those of the steps behind it."""
        taken: list[tuple[Rewarded, ...]] = []
        teaching: list[bool] = []
        replaced = 0
        while left := min(self._groups + replaced, self._most) - len(taken):
            self._ask(left)
            judged = self._take(left)
            if not self._flow.dynamic_sampling:
                self._ask(0)  # groups of the next step, which are written while a reward model judges these
            rewarded = self._reward(judged)
            taken += rewarded
            teaching += map(self._teaches, rewarded)
            replaced = teaching.count(False) if self._flow.dynamic_sampling else 0
        self._ask(0)
        return Batch(tuple(taken), tuple(teaching), replaced, self._staleness(taken))

    def _take(self, left: int) -> list[list[Judged]]:
        """The next groups of a step that lacks so many: all that are needed, or as many as have to be there before a
        group that teaches nothing can be replaced."""
        if self._flow.dynamic_sampling:
            left = self._asked - self.position if self._flow.in_waves else 1
        groups = [self._source.take(number) for number in range(self.position, self.position + left)]
        self.position += left
        return groups

    def _ask(self, left: int) -> None:
        """Ask for as many groups as may be open, where so many are still to be taken for this step."""
        open_ = self._asked - self.position
        room = self._flow.staleness * self._groups + left - open_
        if self._flow.in_waves:
            room = 0 if open_ else min(room, left or self._groups)
        numbers = range(self._asked, self._asked + max(0, room))
        self._source.ask({n: self._prompt(n) for n in numbers}, self._sampling, self._samples, self._seed)
        self._asked = numbers.stop

    def _staleness(self, taken: Sequence[Sequence[Rewarded]]) -> tuple[int, ...]:
        version = self._source.version
        rollouts = [s.rollout for group in taken for s in group]
        found = tuple(version - rollout.weight_version if rollout.tokens else 0 for rollout in rollouts)
        assert max(found) <= self._flow.staleness
        return found
