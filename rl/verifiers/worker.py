"""The verifier workers' processes."""

from lockstep.rl.verifiers.pool import VerifierPool
from lockstep.rl.verifiers.verdict import Verdict
from lockstep.rl.worker import Worker


class VerifierWorker(Worker):
    """A pool of processes that judge answers and can be killed."""

    role = "verifier"

    def __init__(self, rank: int, processes: int, deadline_s: float) -> None:
        super().__init__(rank)
        self.pool = VerifierPool(processes, deadline_s)

    def grade(self, pairs: list[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (response, answer) pairs."""
        return self.pool.grade(pairs)

    def close(self) -> None:
        """End the pool's processes."""
        self.pool.close()
