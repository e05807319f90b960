"""Graders and reward functions of the user's own, as graders that run in the processes of an `AnswerPool`.

The pool pickles them by name, and each of its processes imports the functions before it takes an item.
"""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

from lockstep.data.tasks.user_function import accepting, load
from lockstep.rl.types import Submission
from lockstep.rl.verdict import Outcome, Verdict, of_credit

Terms = TypeVar("Terms")

OFFERED = ("completion", "answer", "prompt", "tokens", "finish_reason", "task")
"""Arguments that a function may ask for by name: the completion, the reference answer and the prompt as texts, the
completion's tokens as a number, `finish_reason` of `Completion`, and the name of the task where there are several."""


class UserFunctions:
    """Functions by their names, which are all that travels: who unpickles them imports them, or raises BadFunction."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """
        Args:
            names: as `module:function` or `file.py:function`, by what each is for.
        """
        self._names = dict(names)

    @cached_property
    def functions(self) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
        """The imported functions, which take the values of `OFFERED`."""
        return {use: accepting(load(name), OFFERED, name) for use, name in self._names.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return _imported, (type(self), self._names)


def _imported(kind: Callable[[Any], UserFunctions], names: Mapping[str, Any]) -> UserFunctions:
    made = kind(names)
    _ = made.functions
    return made


class UserGrader(UserFunctions):
    """Grades by a function that returns true or false, a credit from 0 to 1, a `Verdict`, or None for ungradable."""

    @classmethod
    def of(cls, name: str) -> "UserGrader":
        """The grader of this name."""
        return cls({"grader": name})

    def __call__(self, response: str, submission: Submission) -> Verdict:
        """The verdict on a response. Raises ValueError for a credit outside of 0 to 1, and what the function raises."""
        found = self.functions["grader"](_arguments(response, submission))
        if isinstance(found, Verdict):
            return found
        if found is None:
            return Verdict(Outcome.ungradable, f"{self._names['grader']} returned None")
        if isinstance(found, bool):
            return Verdict(Outcome.correct if found else Outcome.incorrect)
        return of_credit(float(found))


def of_task(by_task: Mapping[str, Terms], task: str, none: Terms) -> Terms:
    """What a task has of its own, or else what stands under an empty name, for all other tasks."""
    return by_task.get(task, by_task.get("", none))


class RewardFunctions(UserFunctions):
    """Computes the recipe's own reward functions: a verdict with `terms`, and a reason for those that are missing."""

    def __init__(self, by_task: Mapping[str, Mapping[str, str]]) -> None:
        """
        Args:
            by_task: names of functions by their term, by task; under an empty name those of all other tasks.
        """
        super().__init__({name: name for terms in by_task.values() for name in terms.values()})
        self._by_task = by_task

    def __reduce__(self) -> tuple[Any, ...]:
        return _imported, (type(self), self._by_task)

    def __call__(self, response: str, submission: Submission) -> Verdict:
        """The terms of a response, those of its task."""
        terms, reasons = dict[str, float](), list[str]()
        names = of_task(self._by_task, submission.task, {})
        for term, name in names.items():
            try:
                terms[term] = _number(self.functions[name](_arguments(response, submission)))
            except Exception as error:
                reasons.append(f"reward function {term} failed with {type(error).__name__}: {error}"[:500])
        return Verdict(Outcome.ungradable if reasons else Outcome.correct, "; ".join(reasons), terms=terms)


def _arguments(response: str, submission: Submission) -> dict[str, Any]:
    given = submission
    values = response, given.key.answer, given.prompt, given.tokens, given.finish_reason, given.task
    return dict(zip(OFFERED, values, strict=True))


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"it returned {number}, and a reward is a finite number")
    return number
