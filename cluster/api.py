"""What `lockstep train` and `lockstep submit` do, as functions of Python: `lockstep.train` and `lockstep.submit`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lockstep.cluster.launch.ray_settings import set_ray_defaults
from lockstep.cluster.recipe.load import resolve
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.records.run_folder import RunFolder

Given = Recipe | Mapping[str, Any] | Path | str
"""A recipe: as an object, as its values, which may have `extends`, as the path of a file, or by the name of one that
ships with the package."""


def train(
    recipe: Given,
    overrides: Mapping[str, Any] | None = None,
    *,
    address: str | None = None,
    resume: bool = False,
    profile: bool = False,
    quiet: bool = False,
) -> RunFolder:
    """Run all phases of a recipe, as `lockstep train` does; called in the main thread, which signals reach.

    Args:
        overrides: values by dotted key, as `{"rl.group_size": 16}`.
        address: of a Ray cluster to use; one is started on this machine, and stopped, otherwise.
        resume: go on from the run's last checkpoint, where it has saved one.
        profile: trace a few steps of each rank of the trainer.
        quiet: print nothing but what workers print.

    Returns:
        The finished run, whose `path`, `summary()`, `metrics()` and `evaluations()` can be read; the last checkpoint is
        `load(run.path)`.

    Raises:
        ValueError: one sentence on what does not fit; nothing is written then.
        lockstep.cluster.run.failures.RunFailed, lockstep.rl.remote.WorkerFailed: when the run ended early; it can go on
            from what it has saved.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the run has saved.
    """
    set_ray_defaults()
    from lockstep.cluster.run.train import train_recipe  # which imports Ray, and that reads the environment

    folder = train_recipe(
        resolve(recipe, overrides), Console(quiet=quiet), address=address, profile=profile, resume=resume
    )
    return RunFolder.open(folder)


def submit(
    recipe: Given,
    address: str = "http://127.0.0.1:8265",
    overrides: Mapping[str, Any] | None = None,
    *,
    quiet: bool = False,
) -> bool:
    """Run a recipe as a job on a Ray head and follow its log, as `lockstep submit` does.

    Args:
        address: of the head's dashboard.
        overrides: values by dotted key.
        quiet: do not print the log.

    Returns:
        Whether the job succeeded.

    Raises:
        ValueError: one sentence on what is wrong with the recipe, or with the head.
    """
    set_ray_defaults()
    from lockstep.cluster.run.submit import submit_recipe  # as in `train`

    return submit_recipe(resolve(recipe, overrides), address, Console(quiet=quiet)) == 0
