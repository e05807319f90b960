"""The verifier workers' processes."""

from lockstep.rl.types import AnswerKey
from lockstep.rl.verdict import Verdict
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.verifiers.judge import GraderName, Judge
from lockstep.rl.workers.base import Worker


class VerifierWorker(Worker):
    """A judge, whose processes can be killed."""

    role = "verifier"

    def __init__(self, rank: int, config: VerifierConfig, grader: GraderName) -> None:
        super().__init__(rank)
        self.judge = Judge(config, grader, self.log.info)

    def start(self, programs: bool) -> None:
        """See `Judge.start`."""
        self.judge.start(programs=programs)

    def grade(self, items: list[tuple[str, AnswerKey]]) -> list[Verdict]:
        """Verdicts on (completion, what it is judged by)."""
        return self.judge.grade(items)

    def close(self) -> None:
        """End the judge's processes."""
        self.judge.close()
