"""Trains a recipe, from checks to the report: preflight, run folder, Ray, phases; behind `lockstep train`."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from lockstep.cluster.launch.placement import Placement, plan_placement
from lockstep.cluster.launch.preflight import check, check_sandbox, last_checkpoint
from lockstep.cluster.launch.ray_session import Interruption, ray_cluster
from lockstep.cluster.recipe.load import to_toml
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.records.progress import Progress
from lockstep.cluster.records.report import write_report
from lockstep.cluster.records.run_folder import RunFolder
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
        ValueError: when the recipe does not fit its model; nothing is written then.
    """
    checked = check(recipe)
    plan = checked.plan
    last = last_checkpoint(plan, checked.start.config) if resume else None
    split = None if recipe.pretrain else make_split(recipe.task, recipe.seed)
    if split and split.has_programs:
        console.print(check_sandbox(recipe.verifier.sandbox), markup=False, highlight=False)
    traces = recipe.folder / "traces" if profile else None
    with Interruption() as interruption:
        run = RunFolder.resume(recipe.folder) if last else RunFolder.create(recipe.folder, to_toml(recipe), recipe.name)
        try:
            with run, Progress(console) as progress:
                _describe(run, split)
                with ray_cluster(address), Placement(plan_placement(recipe.roles, plan.processes)) as placement:
                    interruption.listen()
                    if split is None:
                        run_pretraining(checked, run, progress, traces, last, placement.of("policy"))
                    else:
                        run_phases(checked, split, run, progress, traces, placement, last)
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
