"""Runs the phases of a recipe in attempts: where a rank of a model dies, again from the newest whole checkpoint.

Rollout workers, verifiers and environments are replaced while a run goes on. Ranks of a model are not: they hold what
the others need, and all of them begin again with the same data order, from step 0 where nothing has been saved.
"""

import time
from collections.abc import Callable
from pathlib import Path

from lockstep.cluster.launch.placement import Placement
from lockstep.cluster.launch.preflight import CheckedRun, last_checkpoint
from lockstep.cluster.records.metrics_repair import repair_metrics
from lockstep.cluster.records.progress import Progress
from lockstep.cluster.records.run_folder import METRICS, RunFolder
from lockstep.cluster.run.dry_run import ReadyRun
from lockstep.cluster.run.failures import RunFailed
from lockstep.cluster.run.interruption import Interruption
from lockstep.cluster.run.phases import run_phases
from lockstep.cluster.run.pretraining import run_pretraining
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.rl.remote import WorkerDied

HOUR_S = 3600.0


class Restarts:
    """The causes for which a run began again, and whether it may once more."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            most: restarts within an hour.
        """
        self._most, self._clock = most, clock
        self._causes: list[tuple[float, str]] = []

    def count(self, death: WorkerDied) -> str:
        """Counts a restart; returns its cause in a line.

        Raises:
            RunFailed: when there were too many within an hour; names the first cause first.
            WorkerDied: the death itself, where none is allowed.
        """
        now, cause = self._clock(), _cause_of(death)
        self._causes = [(when, earlier) for when, earlier in self._causes if now - when < HOUR_S]
        if not self._most:
            raise death
        if len(self._causes) >= self._most:
            first = self._causes[0][1]
            raise RunFailed(
                f"{first}; the run began again as often as recovery.restarts={self._most} allows within an hour, and "
                f"then {cause}: mend the cause, and resume"
            ) from death
        self._causes.append((now, cause))
        return cause


def run_attempts(
    ready: ReadyRun,
    run: RunFolder,
    progress: Progress,
    traces: Path | None,
    placement: Placement,
    interruption: Interruption,
) -> None:
    """Run all phases, or those that are left, again where a rank of a model died.

    Args:
        placement: what is reserved; it is reserved anew, on what is left of the cluster, for each further attempt.

    Raises:
        RunFailed: when ranks died too often, or the run cannot begin again.
        WorkerFailed: when a worker raised, or died while the run was told to end.
    """
    checked, last = ready.checked, ready.beginning.last
    restarts = Restarts(checked.plan.recipe.recovery.restarts)
    while True:
        try:
            if not ready.problems:
                run_pretraining(checked, run, progress, traces, last, interruption, placement.of("policy"))
            else:
                run_phases(checked, ready.problems, run, progress, traces, placement, last, interruption)
            return
        except WorkerDied as death:
            if interruption.cause:
                raise
            cause = restarts.count(death)
            try:
                placement.renew()
                last = _rewound(checked, run, progress)
            except ValueError as error:
                raise RunFailed(f"{cause}; the run cannot begin again: {error}") from death
        _note(run, progress, cause, last)


def _cause_of(death: WorkerDied) -> str:
    """Who died and, where Ray says it, why, in a line."""
    first, *others = map(str.strip, str(death).splitlines())
    why = [line.partition(". ")[0] for line in others if " because " in line]
    return f"{first.partition(': ')[0]}: {why[0]}" if why else first


def _rewound(checked: CheckedRun, run: RunFolder, progress: Progress) -> Checkpoint | None:
    """The newest whole checkpoint, if there is one; what metrics say of later steps is dropped."""
    run.close("running")  # lets go of the file that is repaired
    last = last_checkpoint(checked.plan, checked.start.config, progress.say)
    for sentence in repair_metrics(run.path / METRICS, last).sentences:
        progress.say(sentence)
    return last


def _note(run: RunFolder, progress: Progress, cause: str, last: Checkpoint | None) -> None:
    """Write down and say that a run begins again."""
    step = int(last.manifest["step"]) if last else 0
    run.update(restarts=[*run.summary().get("restarts", []), {"step": step, "cause": cause}])
    progress.say(f"{cause}: the run begins again {f'after step {step}' if step else 'from its beginning'}")
