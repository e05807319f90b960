"""Graders and reward functions of the user's own, as graders that run in the processes of an `AnswerPool`.

The pool pickles them by name, and each of its processes imports the functions before it takes an item.
"""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Self

from lockstep.data.tasks.user_function import accepting, load
from lockstep.rl.types import Submission
from lockstep.rl.verdict import Outcome, Verdict, of_credit

OFFERED = ("completion", "answer", "prompt", "tokens", "finish_reason", "task")
"""Arguments that a function may ask for by name: the completion, the reference answer and the prompt as texts, the
completion's tokens as a number, `finish_reason` of `Completion`, and the name of the task where there are several."""

Called = Callable[[Mapping[str, Any]], Any]


class UserGrader:
    """Grades by a function that returns true or false, a credit from 0 to 1, a `Verdict`, or None for ungradable."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: as `module:function` or `file.py:function`.
        """
        self._name = name

    @cached_property
    def _function(self) -> Called:
        return accepting(load(self._name), OFFERED, self._name)

    def loaded(self) -> Self:
        """The grader, whose function is imported. Raises BadFunction."""
        _ = self._function
        return self

    def __reduce__(self) -> tuple[Callable[[str], "UserGrader"], tuple[str]]:
        return _load_grader, (self._name,)

    def __call__(self, response: str, submission: Submission) -> Verdict:
        """The verdict on a response. Raises ValueError for a credit outside of 0 to 1, and what the function raises."""
        found = self._function(_arguments(response, submission))
        if isinstance(found, Verdict):
            return found
        if found is None:
            return Verdict(Outcome.ungradable, f"{self._name} returned None")
        if isinstance(found, bool):
            return Verdict(Outcome.correct if found else Outcome.incorrect)
        return of_credit(float(found))


class RewardFunctions:
    """Computes the recipe's own reward functions: a verdict with `terms`, and a reason for those that are missing."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """
        Args:
            names: of functions, by the name of their term.
        """
        self._names = dict(names)

    @cached_property
    def _functions(self) -> dict[str, Called]:
        return {term: accepting(load(name), OFFERED, name) for term, name in self._names.items()}

    def loaded(self) -> Self:
        """The same, with functions that are imported. Raises BadFunction."""
        _ = self._functions
        return self

    def __reduce__(self) -> tuple[Callable[[Mapping[str, str]], "RewardFunctions"], tuple[dict[str, str]]]:
        return _load_rewards, (self._names,)

    def __call__(self, response: str, submission: Submission) -> Verdict:
        """The terms of a response."""
        terms, reasons = dict[str, float](), list[str]()
        for term, function in self._functions.items():
            try:
                terms[term] = _number(function(_arguments(response, submission)))
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


def _load_grader(name: str) -> UserGrader:
    return UserGrader(name).loaded()


def _load_rewards(names: Mapping[str, str]) -> RewardFunctions:
    return RewardFunctions(names).loaded()
