"""The command line `lockstep`: registers the commands and sets what Ray and Python's warnings read at the start."""

import logging
import sys
import warnings
from typing import Annotated

import typer

import lockstep
from lockstep.cluster.commands import checkpoints, checks, data, evaluate, inference, jobs, recipe, render, train
from lockstep.cluster.launch.ray_settings import set_ray_defaults

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train language models with the same numbers in any layout, in rollout and trainer.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lockstep {lockstep.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Take the options of all commands."""


for name, command in {
    "train": train.run_recipe,
    "submit": jobs.submit,
    "jobs": jobs.list_jobs,
    "logs": jobs.logs,
    "attach": jobs.attach,
    "stop": jobs.stop,
    "resume": jobs.resume,
    "report": train.report,
    "generate": inference.generate,
    "serve": inference.serve,
    "eval": evaluate.evaluate_model,
    "study": evaluate.run_study,
    "grade": evaluate.grade_answers,
    "score": checks.score,
    "convert": checkpoints.convert,
    "verify": checkpoints.verify,
    "inspect": checkpoints.inspect,
    "parity": checks.parity,
    "mismatch": checks.mismatch,
}.items():
    app.command(name)(command)
app.add_typer(data.app, name="data")
app.add_typer(recipe.app, name="recipe")
app.add_typer(render.app, name="render")


def main() -> None:
    """Entry point of the `lockstep` command."""
    set_ray_defaults()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it speaks of compilers that nothing needs
    sys.exit(app())
