"""VerifierWorker: grades completions in processes that can be killed, without loading torch."""

from collections.abc import Mapping, Sequence

from lockstep.rl.types import Submission
from lockstep.rl.verdict import Verdict
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.verifiers.judge import Judge
from lockstep.rl.workers.base import Worker


class VerifierWorker(Worker):
    """Runs a `Judge`, whose grading processes can be killed."""

    role = "verifier"

    def __init__(self, rank: int, config: VerifierConfig, reward_functions: Mapping[str, Mapping[str, str]]) -> None:
        super().__init__(rank)
        self.judge = Judge(config, self.log.info, reward_functions)

    def start(self, graders: Sequence[str]) -> None:
        """Starts the grading processes; see `Judge.start`."""
        self.judge.start(graders)

    def grade(self, items: list[Submission]) -> list[Verdict]:
        """Grades completions; returns a verdict for each, in order."""
        return self.judge.grade(items)

    def close(self) -> None:
        """Ends the grading processes."""
        self.judge.close()
