"""JudgeService: completions go to the verifier that has the least to do, and verdicts come back."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

from lockstep.rl.collector.supervisor import Replacement, Supervisor
from lockstep.rl.remote import Call, WorkerDied, gather
from lockstep.rl.types import Rollout
from lockstep.rl.verdict import Verdict
from lockstep.rl.workers.worker_groups import VerifierGroup


@dataclass(frozen=True)
class _Judging:
    """Completions that a verifier judges."""

    worker: int
    rollouts: Sequence[Rollout]
    known: Verdict | None


class JudgeService:
    """Has completions judged, again where their verifier died."""

    def __init__(self, verifiers: VerifierGroup, supervisor: Supervisor) -> None:
        self._verifiers, self._supervisor = verifiers, supervisor
        self._judging: dict[Call[list[Verdict]], _Judging] = {}
        self._waiting: list[tuple[Sequence[Rollout], Verdict | None]] = []
        self._lost: dict[int, Replacement] = {}

    @property
    def calls(self) -> Collection[Call[list[Verdict]]]:
        """Calls of verifiers that have not been taken."""
        return self._judging.keys()

    @property
    def is_short(self) -> bool:
        """Whether a verifier is being replaced."""
        return bool(self._lost)

    @property
    def adds_terms(self) -> bool:
        """Whether verdicts have terms of reward functions, those of environments included."""
        return bool(self._verifiers.reward_functions)

    def judge(self, rollouts: Sequence[Rollout], known: Verdict | None = None) -> None:
        """Gives completions to the verifier that has the fewest calls open; they wait where none is left.

        Args:
            known: their environment's verdict, which only lacks the terms of reward functions.
        """
        living = [number for number in range(len(self._verifiers.workers)) if number not in self._lost]
        if not living:
            self._waiting.append((rollouts, known))
            return
        load = Counter(judging.worker for judging in self._judging.values())
        worker = min(living, key=lambda number: load[number])
        self._judging[self._verifiers.judge(worker, rollouts, known)] = _Judging(worker, rollouts, known)

    def take(self, call: Call[list[Verdict]]) -> list[tuple[Rollout, Verdict]]:
        """Completions and verdicts of a call that has ended; none where the verifier died, which is replaced."""
        judging = self._judging.pop(call)
        name = f"verifier {judging.worker}"
        try:
            verdicts = gather([call])[0]
        except WorkerDied as death:
            if call.actor is self._verifiers.workers[judging.worker] and judging.worker not in self._lost:
                begin = partial(self._verifiers.replacing, judging.worker)
                self._lost[judging.worker] = Replacement(name, death, begin, self._supervisor)
            self.judge(judging.rollouts, judging.known)
            return []
        self._supervisor.count_result(name)
        return list(zip(judging.rollouts, verdicts, strict=True))

    def replace(self) -> None:
        """Goes on replacing verifiers that died, as far as that takes no waiting.

        Raises:
            WorkerFailed: when one died too often, or none is left and none finds a place.
        """
        for number, replacement in list(self._lost.items()):
            replacement.proceed()
            if replacement.is_ready:
                del self._lost[number]
                self._supervisor.replaced += 1
            elif len(self._lost) == len(self._verifiers.workers):
                replacement.check_place()
        if self._waiting and len(self._lost) < len(self._verifiers.workers):
            waiting, self._waiting = self._waiting, []
            for rollouts, known in waiting:
                self.judge(rollouts, known)

    def drop(self) -> None:
        """Forgets all completions that are being judged."""
        self._judging, self._waiting = {}, []
