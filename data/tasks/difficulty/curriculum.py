"""Curricula: functions of the user's that weigh the problems of a task in each step, and the prompts that follow.

The prompts of a step are a systematic sample of the problems of all tasks, with unequal probabilities (Madow 1949):
each problem comes as often as its weight says, rounded up or down, and so does each task. The sample depends on the
seed, the weights and the number of the step alone, so nothing has to be remembered. Weights do not depend on rewards:
what a run has measured until then would be a state of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.data.batch import Ints
from lockstep.data.tasks.own_problems import FILTERED_BY, fields_of
from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.user_function import BadFunction, accepting, load

Weights = NDArray[np.float64]
WEIGHED_BY = (*FILTERED_BY, "pass_rate", "task", "step", "steps")
"""Arguments that a curriculum may ask for by name: fields of `Problem`, the name of the task where there are several,
the step, which is 1 or more, and the number of steps."""


class ProblemWeights:
    """The weights that a function gives the problems of a task, by step; 1 for all where there is no function."""

    def __init__(self, function: str, problems: Sequence[Problem], task: str, steps: int) -> None:
        """
        Args:
            function: its name; see `user_function`.
            task: name of the task.
            steps: of the phase; those behind it, as after dynamic sampling, have the weights of the last one.

        Raises:
            BadFunction: when it cannot be loaded.
        """
        self._name, self._steps = function, steps
        self._weigh: Callable[[Mapping[str, Any]], Any] = (
            accepting(load(function), WEIGHED_BY, function) if function else lambda values: 1.0
        )
        shared = {"task": task, "steps": steps}
        self._values = [fields_of(problem) | {"pass_rate": problem.pass_rate} | shared for problem in problems]

    def __len__(self) -> int:
        """The number of problems."""
        return len(self._values)

    def __call__(self, step: int) -> Weights:
        """The weights of the problems in a step, [P].

        Raises:
            BadFunction: when the function raises, or returns something else than a finite number from 0 on.
        """
        step = min(step, self._steps)
        return np.array([self._weight(values | {"step": step}) for values in self._values])

    def _weight(self, values: Mapping[str, Any]) -> float:
        place = f"on {values['question'][:80]!r} in step {values['step']}"
        try:
            weight = float(self._weigh(values))
        except Exception as error:
            raise BadFunction(f"{self._name} failed {place} ({type(error).__name__}: {error})") from error
        if not 0 <= weight < math.inf:
            raise BadFunction(f"{self._name} returned {weight} {place}, and a weight is a finite number from 0 on")
        return weight


class Curriculum:
    """An endless order of the training problems of several tasks, by weights that may be others in each step."""

    def __init__(
        self, tasks: Sequence[float], problems: Sequence[ProblemWeights], seed: int, phase: str, prompts: int
    ) -> None:
        """
        Args:
            tasks: weights of the tasks, relative to each other.
            problems: the weights of the problems of each; a task's share is its weight times their mean.
            phase: its order is its own.
            prompts: of a step.
        """
        self._tasks, self._problems = tuple(tasks), tuple(problems)
        self._seed, self._phase, self._prompts = seed, phase, prompts
        self._drawn = lru_cache(maxsize=8)(self._draw)

    def place(self, number: int) -> tuple[int, int]:
        """The task of the n-th prompt, and the index of its problem.

        Raises:
            BadFunction: as `ProblemWeights`, and when all weights of a step are 0.
        """
        step, place = divmod(number, self._prompts)
        task, index = self._drawn(step + 1)[place]
        return int(task), int(index)

    def shares(self, step: int) -> list[Weights]:
        """The share of each problem in a step, [P] of each task, 1 in all; raises as `place`."""
        weights = [task / len(each) * each(step) for task, each in zip(self._tasks, self._problems, strict=True)]
        whole = sum(some.sum() for some in weights)
        if not whole:
            raise BadFunction(f"the curriculum gives every problem the weight 0 in step {step}: let one be above 0")
        return [some / whole for some in weights]

    def _draw(self, step: int) -> Ints:
        """The tasks and problems of a step's prompts, [N, 2]."""
        random = np.random.default_rng([self._seed, *f"curriculum {self._phase}".encode(), step])
        orders = [random.permutation(len(each)) for each in self._problems]
        shares = np.concatenate([some[order] for some, order in zip(self.shares(step), orders, strict=True)])
        places = np.concatenate([np.stack([np.full_like(each, task), each], 1) for task, each in enumerate(orders)])
        bounds = np.cumsum(shares)
        points = (np.arange(self._prompts) + random.random()) / self._prompts * bounds[-1]
        last = np.flatnonzero(shares)[-1]  # a point may be rounded up to the last bound
        found: Ints = random.permutation(places[np.minimum(np.searchsorted(bounds, points, side="right"), last)])
        return found


def check_curriculum(curriculum: Curriculum | None, steps: int) -> None:
    """Whether a curriculum has weights in the first and the last step, and the same ones each time.

    Raises:
        BadFunction: says what is wrong.
    """
    if curriculum is None or not steps:
        return
    for step in (1, steps):
        if not all(map(np.array_equal, curriculum.shares(step), curriculum.shares(step))):
            raise BadFunction(
                f"the curriculum has other weights each time for step {step}, and a run could not go on with the same "
                "prompts: let them depend on its arguments alone"
            )
