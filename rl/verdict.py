"""The verdict on one completion: correct, incorrect or ungradable, because a broken grader is no wrong answer."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Outcome(enum.StrEnum):
    """`ungradable` means that the reference or the infrastructure failed; it says nothing about the completion.

    A completion that its grader does not survive is `incorrect`: it could escape from judgement otherwise.
    """

    correct = "correct"
    incorrect = "incorrect"
    ungradable = "ungradable"


@dataclass(frozen=True)
class Verdict:
    """An outcome, its reason (empty if plain), and the final answer that was read from the completion, if any.

    Raises ValueError for credit outside of 0 to 1, and for credit of what could not be graded.
    """

    outcome: Outcome
    reason: str = ""
    extracted: str | None = None
    credit: float | None = None
    """Where the task defines partial credit: from 0 to 1, and 1 for `correct` only. None where it does not."""
    terms: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Values of the recipe's own reward functions by name; one that failed is missing, and `reason` says why."""

    def __post_init__(self) -> None:
        if self.credit is None:
            return
        if not 0 <= self.credit <= 1:
            raise ValueError(f"a credit of {self.credit} is not one: it goes from 0 to 1")
        if self.outcome is Outcome.ungradable:
            raise ValueError("what could not be graded has no credit: leave it out")

    @property
    def reward(self) -> float | None:
        """The credit; without one 1.0 if correct, 0.0 if incorrect. None if ungradable: it is left out of its group."""
        match self.outcome:
            case Outcome.ungradable:
                return None
            case _ if self.credit is not None:
                return self.credit
            case Outcome.correct:
                return 1.0
            case Outcome.incorrect:
                return 0.0


def of_credit(credit: float, extracted: str | None = None) -> Verdict:
    """The verdict of a task that gives partial credit: correct at 1, incorrect below. ValueError outside of 0 to 1."""
    return Verdict(Outcome.correct if credit == 1 else Outcome.incorrect, extracted=extracted, credit=credit)
