"""The commands `lockstep train` and `lockstep report`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from lockstep.cluster.commands.console import err, out, sentences
from lockstep.cluster.commands.options import MaxHours, Overrides, Profile, RecipeName, Resume, overriding
from lockstep.cluster.exit_codes import FAILED, INFRASTRUCTURE, OUT_OF_TIME


@sentences
def run_recipe(
    recipe: RecipeName,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to use; one is started here otherwise.")] = None,
    profile: Profile = False,
    resume: Resume = False,
    max_hours: MaxHours = None,
) -> None:
    """Run all phases of a recipe and print what it brought.

    Exit codes: 0 finished, 1 failed, 2 refused, 75 infrastructure, 124 out of time, 130 interrupted.

    Example: lockstep train quickstart --set layout.data=4
    """
    from ray.exceptions import RayError

    from lockstep.cluster.recipe.load import load_recipe
    from lockstep.cluster.records.report import summary_table
    from lockstep.cluster.run.failures import RunFailed
    from lockstep.cluster.run.interruption import OutOfTime
    from lockstep.cluster.run.train import train_recipe
    from lockstep.rl.remote import WorkerFailed

    with overriding():
        resolved = load_recipe(recipe, overrides or [])
    try:
        folder = train_recipe(resolved, out, address=address, profile=profile, resume=resume, max_hours=max_hours)
    except (WorkerFailed, RunFailed, RayError) as error:
        lost = _is_infrastructure(error)
        gone = _cluster_is_gone(address or os.environ.get("RAY_ADDRESS")) if lost else None
        err.print(
            f"{gone} ({str(error).splitlines()[0]}): go on with --resume when one is there" if gone else str(error)
        )
        raise typer.Exit(INFRASTRUCTURE if lost else FAILED) from error
    except OutOfTime as error:
        err.print("out of time: go on with --resume")
        raise typer.Exit(OUT_OF_TIME) from error
    out.print(summary_table(folder))
    out.print(f"report: {folder / 'report.html'}")


def _is_infrastructure(error: BaseException | None) -> bool:
    """Whether a process, a node or the cluster was lost: the error or a cause of it says so, and no task raised it."""
    from ray.exceptions import RayError, RayTaskError

    from lockstep.rl.remote import WorkerDied

    while error is not None:
        if isinstance(error, WorkerDied | RayError) and not isinstance(error, RayTaskError):
            return True
        error = error.__cause__
    return False


def _cluster_is_gone(address: str | None) -> str | None:
    """What to say of a cluster that was joined at an address and no longer answers there."""
    from lockstep.cluster.launch.ray_session import ANSWER_S, NoCluster, check_answers

    try:
        if address:
            check_answers(address, ANSWER_S)
    except NoCluster:
        return f"the Ray cluster at {address} no longer answers"
    return None


@sentences
def report(run: Annotated[Path, typer.Argument(help="A run's folder, finished or not.")]) -> None:
    """Write a run's report.html again and print its table.

    Example: lockstep report runs/quickstart
    """
    from lockstep.cluster.records.report import summary_table, write_report

    page = write_report(run)
    out.print(summary_table(run))
    out.print(f"report: {page}")
