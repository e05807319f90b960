"""JudgeService: completions go to the verifier that has the least to do, and verdicts come back."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

from lockstep.rl.collector.supervisor import Supervisor
from lockstep.rl.remote import Call, WorkerDied, gather
from lockstep.rl.types import Rollout
from lockstep.rl.verdict import Verdict
from lockstep.rl.workers.worker_groups import VerifierGroup


@dataclass(frozen=True)
class _Judging:
    """Completions that a verifier judges."""

    worker: int
    rollouts: Sequence[Rollout]


class JudgeService:
    """Has completions judged, again where their verifier died."""

    def __init__(self, verifiers: VerifierGroup, supervisor: Supervisor) -> None:
        self._verifiers, self._supervisor = verifiers, supervisor
        self._judging: dict[Call[list[Verdict]], _Judging] = {}

    @property
    def calls(self) -> Collection[Call[list[Verdict]]]:
        """Calls of verifiers that have not been taken."""
        return self._judging.keys()

    def judge(self, rollouts: Sequence[Rollout]) -> None:
        """Gives completions to the verifier that has the fewest calls open."""
        load = Counter(dict.fromkeys(range(len(self._verifiers.workers)), 0))
        load.update(judging.worker for judging in self._judging.values())
        worker = min(load, key=lambda number: load[number])
        self._judging[self._verifiers.judge(worker, rollouts)] = _Judging(worker, rollouts)

    def take(self, call: Call[list[Verdict]]) -> list[tuple[Rollout, Verdict]]:
        """Completions and verdicts of a call that has ended; none where the verifier died, which is replaced."""
        judging = self._judging.pop(call)
        name = f"verifier {judging.worker}"
        try:
            verdicts = gather([call])[0]
        except WorkerDied as death:
            if call.actor is self._verifiers.workers[judging.worker]:  # not one that has been replaced
                self._supervisor.count_death(name, death)
                self._supervisor.replace(partial(self._verifiers.replace, judging.worker))
            self.judge(judging.rollouts)
            return []
        self._supervisor.count_result(name)
        return list(zip(judging.rollouts, verdicts, strict=True))

    def drop(self) -> None:
        """Forgets all completions that are being judged."""
        self._judging = {}
