"""Trains a recipe, from checks to the report: preflight, run folder, Ray, phases; behind `lockstep train`."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from lockstep.cluster.launch.placement import Placement, plan_placement
from lockstep.cluster.launch.preflight import check, check_sandbox
from lockstep.cluster.launch.ray_session import Interruption, ray_cluster
from lockstep.cluster.launch.run_lock import locked
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.records.progress import Progress
from lockstep.cluster.records.report import write_report
from lockstep.cluster.records.run_folder import RunFolder
from lockstep.cluster.run.beginning import prepare
from lockstep.cluster.run.phases import run_phases
from lockstep.cluster.run.pretraining import run_pretraining
from lockstep.data.tasks.task import Split, make_split


def train_recipe(
    recipe: Recipe, console: Console, *, address: str | None = None, profile: bool = False, resume: bool = False
) -> Path:
    """Run all phases of a recipe; returns the run's folder, with its report written.

    Args:
        profile: trace a few steps of the trainer.
        resume: go on with the run that lies there from its last checkpoint, where it has saved one.

    Raises:
        ValueError: when the recipe does not fit its model, its cluster or what lies in its folder; nothing is written
            then, and a run that lies there stays.
    """
    traces = recipe.folder / "traces" if profile else None
    with Interruption() as interruption, locked(recipe.folder, recipe.saves):
        checked = check(recipe)
        plan, beginning = checked.plan, prepare(checked, resume=resume)
        split = None if recipe.pretrain else make_split(recipe.task, recipe.seed)
        if split and split.has_programs:
            console.print(check_sandbox(recipe.verifier.sandbox), markup=False, highlight=False)
        with ray_cluster(address), Placement(plan_placement(recipe.roles, plan.processes)) as placement:
            interruption.listen()
            run = beginning.open()
            try:
                with run, Progress(console) as progress:
                    _describe(run, split)
                    for change in beginning.changes:
                        progress.say(f"from here on, {change}")
                    if split is None:
                        run_pretraining(checked, run, progress, traces, beginning.last, placement.of("policy"))
                    else:
                        run_phases(checked, split, run, progress, traces, placement, beginning.last)
            finally:
                write_report(recipe.folder)
    return recipe.folder


def _describe(run: RunFolder, split: Split | None) -> None:
    packages = ("torch", "megatron-core", "deepspeed", "ray", "tensorstore")
    run.update(
        software={"python": platform.python_version()} | {p: version(p) for p in packages},
        machine={"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
    )
    if split is not None:
        run.update(
            split={
                "train": len(split.train),
                "held_out": len(split.held_out),
                "overlap": split.overlap,
                "method": split.method,
            }
        )
