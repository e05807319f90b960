"""Supervisor: counts how often workers die and are replaced, and notices when the policy dies."""

from collections import Counter
from collections.abc import Callable

from lockstep.rl.remote import WorkerDied

WATCH_S = 1.0
"""Seconds between two looks at the policy while completions are written."""

DEATHS = 3
"""How often a worker may die before anything came of its work."""


class Supervisor:
    """Decides whether a worker that died is replaced, by how often it died without a result in between."""

    def __init__(self, check_policy: Callable[[], object], clock: Callable[[], float]) -> None:
        """
        Args:
            check_policy: raises where a rank of the policy has died.
            clock: seconds.
        """
        self._check_policy, self._clock, self._seen = check_policy, clock, clock()
        self._deaths: Counter[str] = Counter()
        self.replaced = 0
        """How many workers were replaced so far."""

    def watch(self) -> None:
        """Checks, once in a while, that the policy is alive, which nobody else asks while completions are written.

        Raises:
            WorkerFailed: when a rank of it has died.
        """
        if self._clock() - self._seen > WATCH_S:
            self._check_policy()
            self._seen = self._clock()

    def count_death(self, worker: str, death: WorkerDied) -> None:
        """Counts a death of a worker.

        Raises:
            WorkerDied: when the worker dies again and again.
        """
        self._deaths[worker] += 1
        if self._deaths[worker] > DEATHS:
            raise death

    def count_result(self, worker: str) -> None:
        """Notes that something came of a worker's work, so that its earlier deaths count no more."""
        self._deaths.pop(worker, None)

    def replace(self, start: Callable[[], object]) -> None:
        """Starts a worker in the place of one that died."""
        start()
        self.replaced += 1
