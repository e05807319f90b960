"""Trains a recipe, from checks to the report: preflight, run folder, Ray, phases; behind `lockstep train`."""

import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console

from lockstep.cluster.launch.placement import Placement
from lockstep.cluster.launch.ray_session import ray_cluster
from lockstep.cluster.launch.run_lock import locked
from lockstep.cluster.launch.shared_storage import check_shared
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.records.disk_reserve import DiskReserve
from lockstep.cluster.records.ending import note_killed, this_process
from lockstep.cluster.records.metrics_repair import repair_metrics
from lockstep.cluster.records.progress import Progress
from lockstep.cluster.records.report import write_report
from lockstep.cluster.records.run_folder import METRICS, RunFolder
from lockstep.cluster.run.attempts import run_attempts
from lockstep.cluster.run.dry_run import make_ready
from lockstep.cluster.run.failures import told_in_sentences
from lockstep.cluster.run.inputs import check_inputs
from lockstep.cluster.run.interruption import Interruption, deadline
from lockstep.data.tasks.mixture import ProblemSet


def train_recipe(
    recipe: Recipe,
    console: Console,
    *,
    address: str | None = None,
    profile: bool = False,
    resume: bool = False,
    max_hours: float | None = None,
) -> Path:
    """Run all phases of a recipe; returns the run's folder, with its report written.

    Args:
        profile: trace a few steps of the trainer.
        resume: go on with the run that lies there from its last checkpoint, where it has saved one.
        max_hours: after so many the run has saved and is gone; see `deadline` for when the clock starts.

    Raises:
        OutOfTime: when its time is up; the run has saved.
        ValueError: when the recipe does not fit its model, its cluster or what lies in its folder; nothing is written
            then, and a run that lies there stays.
    """

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    traces, grace = recipe.folder / "traces" if profile else None, recipe.checkpoints.grace
    limit = deadline(max_hours, grace, os.environ, psutil.Process().create_time())
    with Interruption(grace, say, limit) as interruption, locked(recipe.folder, recipe.saves):
        ready = make_ready(recipe, say, resume=resume)
        plan, beginning = ready.checked.plan, ready.beginning
        with ray_cluster(address), Placement(plan, say) as placement:
            check_inputs(recipe)
            interruption.listen()
            check_shared(plan, placement.nodes)
            if ended := note_killed(recipe.folder):
                say(f"the run that lies in {recipe.folder} was {ended}")
            if beginning.last:
                for sentence in repair_metrics(recipe.folder / METRICS, beginning.last).sentences:
                    say(sentence)
            run = beginning.open()
            try:
                with run, Progress(console) as progress, DiskReserve(run.path), told_in_sentences(run.path):
                    _describe(run, ready.problems)
                    for change in beginning.changes:
                        progress.say(f"from here on, {change}")
                    run_attempts(ready, run, progress, traces, placement, interruption)
            finally:
                _report(recipe.folder, say)
    return recipe.folder


def _report(folder: Path, say: Callable[[str], None]) -> None:
    """Write the report, without hiding what ended the run where that is impossible."""
    try:
        write_report(folder)
    except OSError as error:
        say(f"{folder}/report.html was not written: {error}")


def _describe(run: RunFolder, problems: Sequence[ProblemSet]) -> None:
    run.update(ended=None, process=this_process())
    packages = ("torch", "megatron-core", "deepspeed", "ray", "tensorstore")
    run.update(
        software={"python": platform.python_version()} | {p: version(p) for p in packages},
        machine={"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
    )
    if problems:
        splits = [each.split for each in problems]
        methods = [f"{each.name}: {said}" if each.name else said for each in problems if (said := each.split.said)]
        run.update(
            split={
                "train": sum(len(split.train) for split in splits),
                "held_out": sum(len(split.held_out) for split in splits),
                "overlap": sum(split.overlap for split in splits),
                "method": " ".join(methods),
            }
        )
