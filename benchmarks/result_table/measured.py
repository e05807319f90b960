"""Trains a row's run by `lockstep train` in a process of its own, and reads the row from the folder that it leaves."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import xxhash

from lockstep.cluster.records.run_folder import STAGES, SUMMARY, RunFolder
from lockstep.distributed.checkpoint.manager import Checkpoint
from result_table.machine import versions
from result_table.rows import Counts, Place, Row


class RunFailed(RuntimeError):
    """A run that did not finish, in a sentence."""


def train(recipe: Path, folder: Path, settings: Sequence[str]) -> None:
    """Run `lockstep train`, as a user would, into a folder.

    Raises:
        RunFailed: when it did not end well.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, when the run has ended, too.
    """
    named = (f"name={folder.name}", f"run={folder}", *settings)
    command = [sys.executable, "-m", "lockstep", "train", str(recipe), *(f"--set={each}" for each in named)]
    with subprocess.Popen(command) as child:

        def end(number: int, frame: FrameType | None) -> None:
            child.terminate()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, end)
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code:
        raise RunFailed(f"{folder.name} ended with exit code {code}{_reason(folder)}: no row was appended")


def _reason(folder: Path) -> str:
    """What the run's own record says of its end, if it has come so far as to have one."""
    error = RunFolder.open(folder).summary().get("error") if (folder / SUMMARY).is_file() else None
    return f" ({error})" if error else ""


def read_row(run: Path, place: Place) -> Row:
    """The row of a run that `train` has made.

    Raises:
        RunFailed: where accuracy was not measured before and after some training, or nothing could be graded.
    """
    summary = RunFolder.open(run).summary()
    counts = {row["stage"]: _counts(run, row) for row in summary["rows"] if row["stage"] in STAGES}
    before, last = counts.pop("before", None), next(reversed(counts), "")
    if before is None or not last:
        raise RunFailed(f"{run.name} was not measured before and after training: no row was appended")
    after = counts[last]
    return Row(
        **dict(place),
        **dict(after),
        accuracy=after.share,
        before=before,
        supervised=counts.get("supervised") if last != "supervised" else None,
        seconds=summary["seconds"],
        digest=weights_digest(run),
        versions=versions(),
        date=datetime.now(UTC).date().isoformat(),
    )


def _counts(run: Path, row: dict[str, Any]) -> Counts:
    try:
        return Counts(correct=row["correct"], problems=row["total"], ungradable=row["ungradable"])
    except ValueError as error:
        raise RunFailed(f"{run.name}: no answer ({row['stage']}) could be graded: no row was appended") from error


def weights_digest(run: Path) -> str:
    """xxh3-128 of a run's final weights: of name, shape, dtype and the chunks' digests of each tensor, in JSON.

    Optimizer state is left out.

    Raises:
        ValueError: where there is no checkpoint.
    """
    checkpoint = Checkpoint(run)
    names = sorted(checkpoint.tensors.keys() - set(checkpoint.states))
    kept = ("shape", "dtype", "chunk", "digests")
    said = [[name, *(checkpoint.tensors[name][key] for key in kept)] for name in names]
    return xxhash.xxh3_128_hexdigest(json.dumps(said).encode())


def drop_weights(run: Path) -> None:
    """Remove what is large of a run, its first and its last weights; the command that made them makes them again."""
    for name in ("checkpoints", "model"):
        if (run / name).is_dir():
            shutil.rmtree(run / name)
