"""Begins a run: opens a new folder, or that of the run which resumes, when all checks have passed.

Until then nothing is written. So a start that fails leaves the run of that name where it lies.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.launch.preflight import CheckedRun, check_place, last_checkpoint
from lockstep.cluster.launch.resume import changes_since
from lockstep.cluster.recipe.changes import Change
from lockstep.cluster.recipe.load import to_toml
from lockstep.cluster.records.run_folder import RunError, RunFolder, holds_run
from lockstep.distributed.checkpoint.manager import Checkpoint


@dataclass(frozen=True)
class Beginning:
    """Where a run begins: at step 0, or after a checkpoint, with what has changed in its recipe since."""

    plan: RunPlan
    last: Checkpoint | None
    changes: tuple[Change, ...]

    def open(self) -> RunFolder:
        """The run's folder, to write into; a new run moves what lies there aside.

        A run whose folder is gone goes on in a new one under its id, with the evaluations that its checkpoint has.
        """
        run = self._folder(to_toml(self.plan.recipe))
        run.update(data=dict(self.plan.data))
        return run

    def _folder(self, text: str) -> RunFolder:
        recipe, last = self.plan.recipe, self.last
        if last is None:
            return RunFolder.create(recipe.folder, text, recipe.name)
        if holds_run(recipe.folder):
            run = RunFolder.resume(recipe.folder, id=last.manifest.get("run"))
        else:
            run = RunFolder.create(recipe.folder, text, recipe.name, id=last.manifest.get("run"))
            run.update(rows=last.manifest.get("rows", []))
        run.change(text, int(last.manifest["step"]), {each.key: (each.old, each.new) for each in self.changes})
        return run


def prepare(checked: CheckedRun, say: Callable[[str], None], *, resume: bool) -> Beginning:
    """Find where a run begins, and check that its folder and checkpoints are its own; writes nothing.

    Args:
        say: told of damaged checkpoints that are passed over.

    Raises:
        ValueError: when they are another run's, or the recipe is not one that can resume from there.
    """
    plan = checked.plan
    last = last_checkpoint(plan, checked.start.config, say) if resume else None
    if last is None:
        holds_run(plan.recipe.folder)
        check_place(plan)
        return Beginning(plan, None, ())
    _check_same_run(plan, last)
    return Beginning(plan, last, changes_since(plan, last))


def _check_same_run(plan: RunPlan, last: Checkpoint) -> None:
    folder, saved = plan.recipe.folder, last.manifest.get("run")
    there = RunFolder.open(folder).id if holds_run(folder) else None
    if there and saved and there != saved:
        raise RunError(
            f"{last.place} belongs to the run {saved}, and {folder} holds the run {there}: let run and checkpoints.at "
            "name the folder and the checkpoints of one run"
        )
