"""The commands `lockstep convert`, `lockstep verify` and `lockstep inspect`."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cluster.commands.console import err, out, progress, sentences
from lockstep.cluster.commands.options import check_choice

if TYPE_CHECKING:
    from lockstep.cluster.conversion.local_workers import Workers


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
    from lockstep.cluster.conversion import inspection, plan
    from lockstep.cluster.conversion.convert import convert_checkpoint
    from lockstep.cluster.conversion.memory import in_words, size_of
    from lockstep.cluster.conversion.staging import check_destination
    from lockstep.distributed.checkpoint.storage import is_url, storage_of
    from lockstep.model.formats.recast import DTYPES
    from lockstep.model.formats.registry import TARGETS

    check_choice("--to", to, TARGETS)
    check_choice("--dtype", dtype, (None, *DTYPES))
    place = storage_of(destination) if is_url(destination) else Path(destination)
    check_destination(place)
    wanted = plan.Conversion(source, place, to, dtype, size_of(shard_size), size_of(max_memory), workers, weights_only)
    opened = inspection.open_outline(source)
    for line in inspection.plan_lines(wanted, opened):
        (out if dry_run else err).print(line, highlight=False)
    if dry_run:
        return
    with progress("converting") as advance:
        done = convert_checkpoint(wanted, advance, _workers(address), opened)
    bound = f"{'of' if done.peak <= wanted.max_memory else 'MORE than the'} {max_memory} allowed"
    peak = f"peak memory {in_words(done.peak)} above the interpreter's and its imports', {bound}"
    out.print(f"wrote {done.folder}: {in_words(done.size)}, {peak}", highlight=False)


def _workers(address: str | None) -> "Workers":
    from lockstep.cluster.conversion.local_workers import processes

    if address is None:
        return processes
    from lockstep.cluster.conversion.ray_workers import ray_tasks

    return partial(ray_tasks, address)


@sentences
def verify(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint in any format.")],
    against: Annotated[str | None, typer.Option(help="Another, which must hold the same numbers.")] = None,
) -> None:
    """Read a checkpoint to its last byte; the exit code is 1 where something is missing, damaged or different.

    Example: lockstep verify runs/quickstart --against exported
    """
    from lockstep.cluster.checks.verify import verify_checkpoint

    with progress("verifying") as advance:
        found = verify_checkpoint(checkpoint, against, advance)
    for line in (*found.notes, *found.faults):
        err.print(line)
    if found.faults:
        raise typer.Exit(1)
    what = "hold the same numbers" if against else "is whole"
    out.print(f"{' and '.join(filter(None, (checkpoint, against)))} {what}: {found.tensors} tensors", highlight=False)


@sentences
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint in any format, or a folder with a config.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List what a checkpoint holds: tensors, shapes, dtypes, sizes, layout and step.

    Example: lockstep inspect runs/quickstart --json
    """
    from lockstep.cluster.conversion.inspection import inspect_checkpoint, lines

    found = inspect_checkpoint(checkpoint)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for line in lines(found):
            out.print(line, highlight=False)
