"""JudgeService: completions go to the verifier that has the least to do, and verdicts come back.

A call that raises is made again for each of its completions alone, and one that raises alone, too, is ungradable.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lockstep.rl.collector.supervisor import FAILURES, LostWorkers, Supervisor
from lockstep.rl.remote import Call, WorkerDied, WorkerFailed, gather
from lockstep.rl.types import Rollout
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.workers.worker_groups import VerifierGroup


@dataclass(frozen=True)
class _Judging:
    """Completions that a verifier judges."""

    worker: int
    rollouts: Sequence[Rollout]
    known: Verdict | None
    is_retry: bool = False


class JudgeService:
    """Has completions judged, again where their verifier died."""

    def __init__(self, verifiers: VerifierGroup, supervisor: Supervisor) -> None:
        self._verifiers, self._supervisor = verifiers, supervisor
        self._judging: dict[Call[list[Verdict]], _Judging] = {}
        self._waiting: list[tuple[Sequence[Rollout], Verdict | None]] = []
        self._lost = LostWorkers("verifier", len(verifiers.workers), verifiers.replacing, supervisor)
        self._failures = 0

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
        return any(self._verifiers.reward_functions.values())

    def judge(self, rollouts: Sequence[Rollout], known: Verdict | None = None, *, is_retry: bool = False) -> None:
        """Gives completions to the verifier that has the fewest calls open; they wait where none is left.

        Args:
            known: their environment's verdict, which only lacks the terms of reward functions.
            is_retry: whether they are given up where their verifier raises.
        """
        if not self._lost.living:
            self._waiting.append((rollouts, known))
            return
        load = Counter(judging.worker for judging in self._judging.values())
        worker = min(self._lost.living, key=lambda number: load[number])
        self._judging[self._verifiers.judge(worker, rollouts, known)] = _Judging(worker, rollouts, known, is_retry)

    def take(self, call: Call[list[Verdict]]) -> list[tuple[Rollout, Verdict]]:
        """Completions and verdicts of a call that has ended; none where they are judged again.

        Raises:
            WorkerFailed: when verifiers raise again and again.
        """
        judging = self._judging.pop(call)
        name = f"verifier {judging.worker}"
        try:
            verdicts = gather([call])[0]
        except WorkerDied as death:
            if call.actor is self._verifiers.workers[judging.worker] and judging.worker not in self._lost:
                self._lost.add(judging.worker, death)
            self.judge(judging.rollouts, judging.known)
            return []
        except WorkerFailed as failure:
            return self._after_failure(judging, failure)
        self._failures = 0
        self._supervisor.count_result(name)
        return list(zip(judging.rollouts, verdicts, strict=True))

    def _after_failure(self, judging: _Judging, failure: WorkerFailed) -> list[tuple[Rollout, Verdict]]:
        """Has completions judged alone after their call raised, and gives them up where they were alone."""
        if not judging.is_retry:
            for rollout in judging.rollouts:
                self.judge([rollout], judging.known, is_retry=True)
            return []
        self._failures += 1
        if self._failures > FAILURES:
            raise failure
        words = str(failure).strip().splitlines()
        reason = f"its verifier raised, twice: {words[-1]}"[:500]
        return [(rollout, judging.known or Verdict(Outcome.ungradable, reason)) for rollout in judging.rollouts]

    def replace(self) -> None:
        """Goes on replacing verifiers that died, as far as that takes no waiting.

        Raises:
            WorkerFailed: when one died too often, or none is left and none finds a place.
        """
        self._lost.proceed()
        if self._waiting and self._lost.living:
            waiting, self._waiting = self._waiting, []
            for rollouts, known in waiting:
                self.judge(rollouts, known)

    def drop(self) -> None:
        """Forgets all completions that are being judged."""
        self._judging, self._waiting = {}, []
