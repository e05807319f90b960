"""The command line: thin; every command is one call into the package, and every user error is one sentence."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cluster import corpus, evaluation_command, grading_commands, inference_commands
from lockstep.cluster.console import err, out, progress, sentences

if TYPE_CHECKING:
    from lockstep.cluster.workers import Workers
    from lockstep.model.config import Numerics

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
    from lockstep.rl.remote import WorkerFailed

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


app.command()(inference_commands.generate)
app.command()(inference_commands.serve)
app.command("eval")(evaluation_command.evaluate)
app.command()(grading_commands.grade)


@app.command()
@sentences
def mismatch(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, a run, a Hugging Face folder or a .gguf file.")],
    numerics: Annotated[str, typer.Option(help="fast or exact.")] = "fast",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    tensor: Annotated[int, typer.Option(min=1, help="Tensor degree, of rollouts and training alike.")] = 1,
    prompts: Annotated[
        Path | None, typer.Option(help='A file of prompts, one a line, or JSON lines with a "prompt"; sums otherwise.')
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts at most.")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Compare the log-probabilities of rollouts with the trainer's; in exact numerics a differing bit is exit code 1.

    Example: lockstep mismatch runs/quickstart --numerics exact
    """
    from lockstep.cluster.mismatch import Work, table
    from lockstep.cluster.mismatch import mismatch as measure_mismatch
    from lockstep.rl.rollout.config import SamplingParams

    _check_choice("--numerics", numerics, ("fast", "exact"))
    _check_choice("--dtype", dtype, ("bfloat16", "float32"))
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the processes that are started
    sampling = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)
    chosen: Numerics = "exact" if numerics == "exact" else "fast"
    work = Work(sampling, dtype, chosen, tensor, prompts, count, samples, seed)
    found = measure_mismatch(checkpoint, work)
    if as_json:
        print(json.dumps(asdict(found) | {"numerics": numerics, "dtype": dtype, "tensor": tensor}))
    else:
        out.print(table(found, work))
    if numerics == "exact" and found.differing_bits:
        raise typer.Exit(1)


@app.command()
@sentences
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint in any format, or a name on the Hugging Face Hub.")],
    destination: Annotated[str, typer.Argument(help="A folder that does not exist, or a URL for Lockstep's format.")],
    to: Annotated[str, typer.Option(help="lockstep, hf, peft, megatron or deepspeed.")] = "lockstep",
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16; as in the source otherwise.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of weights, where a format has several.")] = "5GB",
    max_memory: Annotated[str, typer.Option(help="That all processes may need above their imports.")] = "8GB",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to work on; this machine otherwise.")] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave the optimizer's state where it is.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Convert a checkpoint. Killed, the same command goes on where it stopped.

    Example: lockstep convert runs/quickstart exported --to hf
    """
    from lockstep.cluster import contents, conversion
    from lockstep.cluster.convert import convert as convert_checkpoint
    from lockstep.cluster.memory import in_words, size_of
    from lockstep.cluster.partial import check_destination
    from lockstep.cluster.targets import TARGETS
    from lockstep.distributed.checkpoint.storage import is_url, storage_of
    from lockstep.model.formats.recast import DTYPES

    _check_choice("--to", to, TARGETS)
    _check_choice("--dtype", dtype, (None, *DTYPES))
    place = storage_of(destination) if is_url(destination) else Path(destination)
    check_destination(place)
    wanted = conversion.Conversion(
        source, place, to, dtype, size_of(shard_size), size_of(max_memory), workers, weights_only
    )
    for line in contents.plan(wanted):
        (out if dry_run else err).print(line, markup=False, highlight=False)
    if dry_run:
        return
    with progress("converting") as advance:
        done = convert_checkpoint(wanted, advance, _workers(address))
    bound = f"{'of' if done.peak <= wanted.max_memory else 'MORE than the'} {max_memory} allowed"
    peak = f"peak memory {in_words(done.peak)} above the interpreter's and its imports', {bound}"
    out.print(f"wrote {done.folder}: {in_words(done.size)}, {peak}", highlight=False)


def _workers(address: str | None) -> "Workers":
    from lockstep.cluster.workers import processes

    if address is None:
        return processes
    from lockstep.cluster.ray_workers import ray_tasks

    return partial(ray_tasks, address)


def _check_choice(option: str, given: str | None, known: Iterable[str | None]) -> None:
    if given not in known:
        *first, last = (word for word in known if word)
        raise ValueError(f"{option} {given!r} is not supported: use {', '.join(first)} or {last}")


@app.command()
@sentences
def verify(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint in any format.")],
    against: Annotated[str | None, typer.Option(help="Another, which must hold the same numbers.")] = None,
) -> None:
    """Read a checkpoint to its last byte; the exit code is 1 where something is missing, damaged or different.

    Example: lockstep verify runs/quickstart --against exported
    """
    from lockstep.cluster.verify import verify as verify_checkpoint

    with progress("verifying") as advance:
        found = verify_checkpoint(checkpoint, against, advance)
    for line in (*found.notes, *found.faults):
        err.print(line, markup=False)
    if found.faults:
        raise typer.Exit(1)
    what = "hold the same numbers" if against else "is whole"
    out.print(f"{' and '.join(filter(None, (checkpoint, against)))} {what}: {found.tensors} tensors", highlight=False)


@app.command()
@sentences
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint in any format, or a folder with a config.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List what a checkpoint holds: tensors, shapes, dtypes, sizes, layout and step.

    Example: lockstep inspect runs/quickstart --json
    """
    from lockstep.cluster.contents import contents, lines

    found = contents(checkpoint)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for line in lines(found):
            out.print(line, markup=False, highlight=False)


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
