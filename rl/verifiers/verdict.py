"""What a verifier says of one completion: three outcomes, because a broken grader must not look like a wrong answer."""

import enum
from dataclasses import dataclass


class Outcome(enum.StrEnum):
    """`ungradable` means that the reference or the infrastructure failed; it says nothing about the completion."""

    correct = "correct"
    incorrect = "incorrect"
    ungradable = "ungradable"


@dataclass(frozen=True)
class Verdict:
    """An outcome, why it was given (empty if plain), and the final answer that was read from the completion, if any."""

    outcome: Outcome
    reason: str = ""
    extracted: str | None = None

    @property
    def reward(self) -> float | None:
        """1.0 if correct, 0.0 if incorrect, None if ungradable: such a completion is left out of its group."""
        match self.outcome:
            case Outcome.correct:
                return 1.0
            case Outcome.incorrect:
                return 0.0
            case Outcome.ungradable:
                return None
