"""Supervisor: counts how often workers die and are replaced, and notices when the policy dies."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from lockstep.rl.remote import Call, WorkerDied, WorkerFailed, gather, have_ended

WATCH_S = 1.0
"""Seconds between two looks at the policy while completions are written."""

DEATHS = 3
"""How often a worker may die before anything came of its work."""

FAILURES = 8
"""How many samples in a row may be ungradable because an engine or a verifier raised."""

PLACE_S = 600.0
"""Seconds that a run waits for a place for a worker where none of its kind is left."""


class Supervisor:
    """Decides whether a worker that died is replaced, by how often it died without a result in between."""

    def __init__(self, check_policy: Callable[[], object], clock: Callable[[], float]) -> None:
        """
        Args:
            check_policy: raises where a rank of the policy has died.
            clock: seconds.
        """
        self.clock = clock
        self._check_policy, self._seen = check_policy, clock()
        self._deaths: Counter[str] = Counter()
        self.replaced = 0
        """How many workers were replaced so far."""

    def watch(self) -> None:
        """Checks, once in a while, that the policy is alive, which nobody else asks while completions are written.

        Raises:
            WorkerFailed: when a rank of it has died.
        """
        if self.clock() - self._seen > WATCH_S:
            self._check_policy()
            self._seen = self.clock()

    def count_death(self, worker: str, death: WorkerDied) -> int:
        """Counts a death of a worker, a replacement that died included; returns how many there were without a result.

        Raises:
            WorkerFailed: when the worker dies again and again.
        """
        self._deaths[worker] += 1
        if self._deaths[worker] > DEATHS:
            raise WorkerFailed(f"{death} (it died {DEATHS + 1} times before anything came of its work)") from death
        return self._deaths[worker]

    def count_result(self, worker: str) -> None:
        """Notes that something came of a worker's work, so that its earlier deaths count no more."""
        self._deaths.pop(worker, None)

    def pause_after(self, worker: str, death: WorkerDied) -> float:
        """Counts a death; returns seconds to wait before a replacement, since Ray may not know of a lost node yet.

        Raises:
            WorkerFailed: when the worker died too often.
        """
        return WATCH_S * (2 ** (self.count_death(worker, death) - 1) - 1)


class Replacement:
    """Puts a worker in the place of one that died, while others go on; again where that dies before it is ready."""

    def __init__(
        self, worker: str, death: WorkerDied, begin: Callable[[], Iterator[Sequence[Call[Any]]]], supervisor: Supervisor
    ) -> None:
        """
        Args:
            begin: starts the worker; it yields calls to be waited for, one group after the other, until it is ready.

        Raises:
            WorkerFailed: when the worker died too often.
        """
        self._worker, self._begin, self._supervisor = worker, begin, supervisor
        self.calls: list[Call[Any]] = []
        """Those that are waited for at present."""
        self._since = supervisor.clock()
        self.fail(death)

    @property
    def is_ready(self) -> bool:
        """Whether the worker has a place and all that does not come from the policy."""
        return self._steps is not None and not self.calls

    def fail(self, death: WorkerDied) -> None:
        """Begins again after one more death.

        Raises:
            WorkerFailed: when there were too many.
        """
        self._due = self._supervisor.clock() + self._supervisor.pause_after(self._worker, death)
        self._steps: Iterator[Sequence[Call[Any]]] | None = None
        self.calls = []

    def proceed(self) -> None:
        """Goes on as far as it can without waiting.

        Raises:
            WorkerFailed: when the worker died too often.
        """
        try:
            if self._steps is None and self._supervisor.clock() >= self._due:
                self._steps = self._begin()
                self.calls = list(next(self._steps))
            while self._steps and self.calls and have_ended(self.calls):
                gather(self.calls)
                self.calls = list(next(self._steps, ()))
        except WorkerDied as death:
            self.fail(death)

    def check_place(self) -> None:
        """To be called while no other worker of its kind is left.

        Raises:
            WorkerFailed: when it has waited for too long.
        """
        if not self.is_ready and self._supervisor.clock() - self._since > PLACE_S:
            raise WorkerFailed(
                f"{self._worker} died, no other is left, and for {PLACE_S:.0f} s the cluster had no place for one: add "
                "a node, and resume"
            )


class LostWorkers:
    """Workers of a role that died, by number, until others have taken their places; those that live go on meanwhile."""

    def __init__(
        self,
        role: str,
        count: int,
        replacing: Callable[[int], Iterator[Sequence[Call[Any]]]],
        supervisor: Supervisor,
    ) -> None:
        """
        Args:
            count: workers that the role has.
            replacing: starts the worker of a number; see `Replacement`.
        """
        self._role, self._count, self._replacing, self._supervisor = role, count, replacing, supervisor
        self._replacements: dict[int, Replacement] = {}

    def __contains__(self, number: object) -> bool:
        return number in self._replacements

    def __len__(self) -> int:
        return len(self._replacements)

    @property
    def living(self) -> list[int]:
        """Numbers of the workers that have not died."""
        return [number for number in range(self._count) if number not in self]

    def add(self, number: int, death: WorkerDied) -> None:
        """Begins to replace a worker.

        Raises:
            WorkerFailed: when it died too often.
        """
        worker, begin = f"{self._role} {number}", partial(self._replacing, number)
        self._replacements[number] = Replacement(worker, death, begin, self._supervisor)

    def proceed(self, *, restore: bool = True) -> None:
        """Goes on replacing workers, as far as that takes no waiting.

        Args:
            restore: whether workers that are ready live from then on; otherwise `restore` has to be called for each.

        Raises:
            WorkerFailed: when one died too often, or none is left and none finds a place.
        """
        for number, replacement in list(self._replacements.items()):
            replacement.proceed()
            if replacement.is_ready and restore:
                self.restore(number)
            elif not self.living:
                replacement.check_place()

    @property
    def ready(self) -> list[int]:
        """Numbers of the workers that have a place and all that does not come from the policy."""
        return [number for number, replacement in self._replacements.items() if replacement.is_ready]

    def restore(self, number: int) -> None:
        """Counts a worker as living again."""
        del self._replacements[number]
        self._supervisor.replaced += 1

    def fail(self, number: int, death: WorkerDied) -> None:
        """Begins again with a replacement that died, too.

        Raises:
            WorkerFailed: when it died too often.
        """
        self._replacements[number].fail(death)
