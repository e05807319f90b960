"""The command line: thin; every command is one call into the package, and every user error is one sentence."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from lockstep.cluster import corpus
from lockstep.cluster.console import err, out, sentences

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train language models with the same numbers in any layout, in rollout and trainer.",
)
app.add_typer(corpus.app, name="data")

RAY_SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
}
"""Read by Ray when it is imported: workers' lines come through as they were written, each saying who speaks."""

Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key, as in --set rl.group_size=8.")]


@app.command()
@sentences
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, for example recipes/quickstart.toml.")],
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

    Example: lockstep train recipes/quickstart.toml --set layout.data=4
    """
    from lockstep.cluster import jobs
    from lockstep.cluster.config import load_recipe
    from lockstep.cluster.pretraining import Diverged
    from lockstep.cluster.report import summary_table
    from lockstep.rl.actors import WorkerFailed

    resolved = load_recipe(recipe, overrides or [])
    try:
        folder = jobs.train(resolved, out, address=address, profile=profile, resume=resume)
    except (WorkerFailed, Diverged) as error:
        err.print(str(error), markup=False)
        raise typer.Exit(1) from error
    out.print(summary_table(folder))
    out.print(f"report: {folder / 'report.html'}")


@app.command()
@sentences
def parity(
    recipe: Annotated[Path, typer.Argument(help="A recipe that trains on text, as recipes/parity-tiny.toml.")],
    layouts: Annotated[list[str], typer.Option("--layouts", help='A layout, as "tensor=2,zero=2"; more may follow.')],
    more: Annotated[list[str] | None, typer.Argument(metavar="[LAYOUT]...", help="More layouts.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to compare.")] = 20,
    overrides: Overrides = None,
) -> None:
    """Train in each layout and compare with one process; the exit code is 1 where a layout computes something else.

    Example: lockstep parity recipes/parity-tiny.toml --layouts "tensor=2,sequence=true" "pipeline=2,virtual=2"
    """
    from lockstep.cluster.config import load_recipe
    from lockstep.cluster.parity import compare, table

    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the processes that are started
    resolved = load_recipe(recipe, overrides or [])
    found = compare(resolved, [*layouts, *(more or [])], steps, lambda line: err.print(line, markup=False))
    out.print(table(found))
    if not found.holds:
        raise typer.Exit(1)


@app.command()
@sentences
def generate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, a run, a Hugging Face folder or a .gguf file.")],
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given more than once.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template.")] = True,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Answer a prompt.

    Example: lockstep generate runs/quickstart "What is 12 + 34?" --top-p 0.9
    """
    from lockstep.cluster.config import validation_sentence
    from lockstep.cluster.inference import generate as generate_text
    from lockstep.rl.rollout.sampler import SamplingConfig

    try:
        sampling = SamplingConfig(
            temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens, stop=tuple(stop or ())
        )
    except ValidationError as error:
        raise ValueError(validation_sentence(error, SamplingConfig)) from error
    out.print(
        generate_text(checkpoint, prompt, sampling, seed=seed, chat=chat, dtype=dtype), markup=False, highlight=False
    )


@app.command("eval")
@sentences
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, a run, a Hugging Face folder or a .gguf file.")],
    task: Annotated[str, typer.Option(help="A recipe whose task to use, a reasoning-gym data set, or a .jsonl file.")],
    overrides: Overrides = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    output: Annotated[Path | None, typer.Option(help="Write every completion and verdict here, as JSON lines.")] = None,
) -> None:
    """Greedy exact match on the held-out problems of a task, with a 95% interval.

    Example: lockstep eval runs/quickstart --task recipes/quickstart.toml
    """
    from lockstep.cluster.inference import evaluate as evaluate_task

    line = evaluate_task(checkpoint, task, overrides or [], max_new_tokens=max_new_tokens, dtype=dtype, output=output)
    out.print(line)


@app.command()
@sentences
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint, a Hugging Face folder or Hub name, or a .gguf file.")],
    destination: Annotated[Path, typer.Argument(help="A folder that does not exist.")],
    to: Annotated[str, typer.Option(help="lockstep or hf.")] = "lockstep",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; as in the source otherwise.")] = None,
) -> None:
    """Convert a checkpoint.

    Example: lockstep convert runs/quickstart exported --to hf
    """
    from lockstep.cluster import convert as conversion

    if to not in ("lockstep", "hf"):
        raise ValueError(f"--to {to!r} is not a format: use lockstep or hf")
    _check_dtype(dtype)
    if destination.exists():
        raise ValueError(f"{destination} exists: give a folder that does not")
    run = conversion.to_lockstep if to == "lockstep" else conversion.to_huggingface
    out.print(f"wrote {run(source, destination, dtype=dtype)}")


def _check_dtype(dtype: str | None) -> None:
    if dtype not in (None, "bfloat16", "float32"):
        raise ValueError(f"--dtype {dtype!r} is not supported: use bfloat16 or float32")


@app.command()
@sentences
def report(run: Annotated[Path, typer.Argument(help="A run's folder, finished or not.")]) -> None:
    """Write a run's report.html again and print its table.

    Example: lockstep report runs/quickstart
    """
    from lockstep.cluster.report import summary_table, write_report

    page = write_report(run)
    out.print(summary_table(run))
    out.print(f"report: {page}")


@app.command()
@sentences
def submit(
    recipe: Annotated[Path, typer.Argument(help="A recipe; it is sent as it is here.")],
    address: Annotated[str, typer.Option(help="The dashboard of a running Ray head.")] = "http://127.0.0.1:8265",
    overrides: Overrides = None,
) -> None:
    """Run a recipe as a Ray job, follow its log, and end with its exit code.

    Example: lockstep submit recipes/quickstart.toml --address http://head:8265
    """
    from lockstep.cluster.config import load_recipe
    from lockstep.cluster.submit import submit as submit_job

    raise typer.Exit(submit_job(load_recipe(recipe, overrides or []), address, out))


def main() -> None:
    """Entry point of the `lockstep` command."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it speaks of compilers that nothing needs
    sys.exit(app())
