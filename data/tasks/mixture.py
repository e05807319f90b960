"""Mixtures of tasks: which task gives the n-th prompt, and which of its problems, follows from weights and seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from pydantic import Field

from lockstep.data.batch import Ints
from lockstep.data.corpus.blend import Blend
from lockstep.data.tasks.difficulty.curriculum import Curriculum, ProblemWeights
from lockstep.data.tasks.difficulty.pass_rates import filter_by_pass_rate
from lockstep.data.tasks.task import Split, TaskConfig, make_split


class MixedTask(TaskConfig):
    """One task of several, with a name and a weight."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="of the task, in metrics and tables")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="its share of prompts, relative to the others'")


@dataclass(frozen=True)
class ProblemSet:
    """The problems of one task."""

    config: TaskConfig
    split: Split
    name: str = ""
    """Empty where there is one task alone."""
    weight: float = 1.0


def problem_sets(tasks: Sequence[TaskConfig], seed: int) -> tuple[ProblemSet, ...]:
    """The problems of tasks, a pure function of (tasks, seed); raises as `make_split` and `filter_by_pass_rate`."""
    return tuple(
        ProblemSet(task, training_split(task, seed), task.name, task.weight)
        if isinstance(task, MixedTask)
        else ProblemSet(task, training_split(task, seed))
        for task in tasks
    )


def training_split(task: TaskConfig, seed: int) -> Split:
    """The split of a task that is trained on: its problems, or those whose measured pass rate it asks for."""
    split = make_split(task, seed)
    return filter_by_pass_rate(split, task) if task.pass_rates else split


def curriculum_of(problems: Sequence[ProblemSet], seed: int, phase: str, prompts: int, steps: int) -> Curriculum | None:
    """The curriculum of a phase of so many steps, of so many prompts each; None where no task has one.

    Raises:
        BadFunction: when a function cannot be loaded.
    """
    if not any(each.config.curriculum for each in problems):
        return None
    weighed = [ProblemWeights(each.config.curriculum, each.split.train, each.name, steps) for each in problems]
    return Curriculum([each.weight for each in problems], weighed, seed, phase, prompts)


class Mixture:
    """An endless order of the training problems of several tasks, in which each has its share of every stretch."""

    def __init__(self, weights: Sequence[float], sizes: Sequence[int], seed: int) -> None:
        """
        Args:
            weights: of the tasks, relative to each other.
            sizes: training problems of each.
        """
        self._blend, self._sizes, self._seed = Blend(weights), tuple(sizes), seed

    def place(self, number: int, phase: str) -> tuple[int, int]:
        """The task of the n-th prompt of a phase, and the index of its problem.

        A task goes through its problems epoch after epoch, each shuffled by the seed.
        """
        tasks, within = self._blend.take(number, number + 1)
        task = int(tasks[0])
        return task, shuffled(int(within[0]), self._sizes[task], self._seed, phase)


def shuffled(number: int, size: int, seed: int, phase: str) -> int:
    """The index of the n-th of `size` things in a phase, which come epoch after epoch, each shuffled by the seed."""
    epoch, place = divmod(number, size)
    return int(_order(epoch, size, seed, phase)[place])


@lru_cache(maxsize=8)
def _order(epoch: int, size: int, seed: int, phase: str) -> Ints:
    return np.random.default_rng([seed, *phase.encode(), epoch]).permutation(size)
