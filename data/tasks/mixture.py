"""Mixtures of tasks: which task gives the n-th prompt, and which of its problems, follows from weights and seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from pydantic import Field

from lockstep.data.batch import Ints
from lockstep.data.corpus.blend import Blend
from lockstep.data.tasks.difficulty.curriculum import Curriculum, ProblemWeights
from lockstep.data.tasks.difficulty.pass_rates import filter_by_pass_rate
from lockstep.data.tasks.task import Split, TaskConfig, held_out_split, make_split


class NamedTask(TaskConfig):
    """One task of several, with a name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="of the task, in metrics and tables")


class MixedTask(NamedTask):
    """One task of several that are trained on, with a name and a weight."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="its share of prompts, relative to the others'")


@dataclass(frozen=True)
class ProblemSet:
    """The problems of one task."""

    config: TaskConfig
    split: Split
    name: str = ""
    """Empty where there is one task alone."""
    weight: float = 1.0
    """0 where held-out problems are evaluated, and none is trained on."""


def problem_sets(tasks: Sequence[TaskConfig], seed: int, evaluated: Sequence[NamedTask] = ()) -> tuple[ProblemSet, ...]:
    """The problems of tasks, a pure function of them and the seed; raises as `make_split` and `filter_by_pass_rate`.

    Args:
        evaluated: tasks that are not trained on, which come last.
    """
    trained = tuple(
        ProblemSet(task, training_split(task, seed), task.name, task.weight)
        if isinstance(task, MixedTask)
        else ProblemSet(task, training_split(task, seed))
        for task in tasks
    )
    beside = ((task, replace(held_out_split(task, seed), train=(), method="")) for task in evaluated)
    return (*trained, *(ProblemSet(task, split, task.name, 0.0) for task, split in beside))


def trained_on(problems: Sequence[ProblemSet]) -> tuple[ProblemSet, ...]:
    """Those of the tasks that are trained on."""
    return tuple(each for each in problems if each.weight)


def training_split(task: TaskConfig, seed: int) -> Split:
    """The split of a task that is trained on: its problems, or those whose measured pass rate it asks for."""
    split = make_split(task, seed)
    return filter_by_pass_rate(split, task) if task.pass_rates else split


def curriculum_of(problems: Sequence[ProblemSet], seed: int, phase: str, prompts: int, steps: int) -> Curriculum | None:
    """The curriculum of a phase of so many steps, of so many prompts each; None where no task has one.

    Raises:
        BadFunction: when a function cannot be loaded.
    """
    trained = trained_on(problems)
    if not any(each.config.curriculum for each in trained):
        return None
    weighed = [ProblemWeights(each.config.curriculum, each.split.train, each.name, steps) for each in trained]
    return Curriculum([each.weight for each in trained], weighed, seed, phase, prompts)


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
