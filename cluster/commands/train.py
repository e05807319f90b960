"""The commands `lockstep train`, `lockstep submit` and `lockstep report`."""

from pathlib import Path
from typing import Annotated

import typer

from lockstep.cluster.commands.console import err, out, sentences
from lockstep.cluster.commands.options import Overrides, RecipeName, overriding


@sentences
def run_recipe(
    recipe: RecipeName,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to use; one is started here otherwise.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps of each trainer rank into <run>/traces, for Perfetto.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's last checkpoint, in this layout, if it saved one.")
    ] = False,
) -> None:
    """Run all phases of a recipe and print what it brought.

    Example: lockstep train quickstart --set layout.data=4
    """
    from lockstep.cluster.recipe.load import load_recipe
    from lockstep.cluster.records.report import summary_table
    from lockstep.cluster.run.failures import RunFailed
    from lockstep.cluster.run.train import train_recipe
    from lockstep.rl.remote import WorkerFailed

    with overriding():
        resolved = load_recipe(recipe, overrides or [])
    try:
        folder = train_recipe(resolved, out, address=address, profile=profile, resume=resume)
    except (WorkerFailed, RunFailed) as error:
        err.print(str(error))
        raise typer.Exit(1) from error
    out.print(summary_table(folder))
    out.print(f"report: {folder / 'report.html'}")


@sentences
def report(run: Annotated[Path, typer.Argument(help="A run's folder, finished or not.")]) -> None:
    """Write a run's report.html again and print its table.

    Example: lockstep report runs/quickstart
    """
    from lockstep.cluster.records.report import summary_table, write_report

    page = write_report(run)
    out.print(summary_table(run))
    out.print(f"report: {page}")


@sentences
def submit(
    recipe: RecipeName,
    address: Annotated[str, typer.Option(help="The dashboard of a running Ray head.")] = "http://127.0.0.1:8265",
    overrides: Overrides = None,
) -> None:
    """Run a recipe, as it is here, as a Ray job, follow its log, and end with its exit code.

    Example: lockstep submit quickstart --address http://head:8265
    """
    from lockstep.cluster.recipe.load import load_recipe
    from lockstep.cluster.run.submit import submit_recipe

    with overriding():
        resolved = load_recipe(recipe, overrides or [])
    raise typer.Exit(submit_recipe(resolved, address, out))
