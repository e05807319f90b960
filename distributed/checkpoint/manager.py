"""A run's checkpoints: `step-000120` folders that appear whole or not at all, and `latest`, a link to the newest."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lockstep.distributed.checkpoint.spec import STATES, Piece
from lockstep.distributed.checkpoint.store import ArrayFolder, write

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")


class BadCheckpoint(ValueError):
    """A folder that is not a whole checkpoint of a version that this program reads."""


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def save(
    checkpoints: Path,
    step: int,
    held: Iterable[tuple[Tensor, Piece]],
    manifest: dict[str, Any],
    files: dict[str, str],
    *,
    rank: int,
    barrier: Callable[[], object],
) -> Path:
    """Write one checkpoint from all ranks; it takes its final name when every rank's part is on disk.

    Args:
        held: the parameters of this rank and the pieces in them.
        manifest: what the checkpoint says of itself; written by rank 0, last.
        files: text files to keep beside the arrays, such as the tokenizer's.
        barrier: returns when every rank has called it.
    """
    final = checkpoints / step_name(step)
    partial = checkpoints / f"{final.name}.partial"
    if rank == 0:
        for interrupted in checkpoints.glob("step-*.partial"):
            shutil.rmtree(interrupted, ignore_errors=True)
        (partial / "arrays").mkdir(parents=True)
    barrier()
    write(partial / "arrays", held)
    barrier()
    if rank == 0:
        for name, text in files.items():
            (partial / name).write_text(text)
        own = {"format": FORMAT, "step": step, "files": sorted(files)}
        (partial / "manifest.json").write_text(json.dumps(own | manifest, indent=2))
        _commit(partial, final)
    barrier()
    return final


def _commit(partial: Path, final: Path) -> None:
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _link_latest(final)


def _link_latest(checkpoint: Path) -> None:
    link = checkpoint.parent / f"latest.{os.getpid()}"
    link.symlink_to(checkpoint.name)
    link.replace(checkpoint.parent / "latest")
    _sync(checkpoint.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run or of a checkpoints folder.

    Raises:
        BadCheckpoint: when there is none.
    """
    for place in (path, path / "checkpoints"):
        if (place / "manifest.json").is_file():
            return place
        steps = _saved(place)
        if steps:
            return steps[max(steps)]
    raise BadCheckpoint(f"{path} holds no checkpoint: give a folder with a manifest.json, or a run that saved one")


def _saved(checkpoints: Path) -> dict[int, Path]:
    """The whole checkpoints of a folder, by step."""
    names = {p: _NAME.fullmatch(p.name) for p in checkpoints.glob("step-*") if (p / "manifest.json").is_file()}
    return {int(match[1]): path for path, match in names.items() if match}


def drop_after(checkpoints: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a run has taken back; `latest` is the newest that is left."""
    steps = _saved(checkpoints)
    left = [s for s in steps if s <= step]
    if left:
        _link_latest(steps[max(left)])
    elif steps:
        (checkpoints / "latest").unlink()
    for later in steps.keys() - left:
        shutil.rmtree(steps[later])


class Checkpoint:
    """A `Source` over a saved checkpoint, with what its manifest says."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            BadCheckpoint: when the path holds none, or one of a newer format.
        """
        self.path = find(path)
        self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        if self.manifest.get("format") != FORMAT:
            raise BadCheckpoint(
                f"{self.path} has format {self.manifest.get('format')}, and this program reads format {FORMAT}"
            )
        self.read = ArrayFolder(self.path / "arrays").read

    @property
    def states(self) -> Sequence[str]:
        """See `Source`."""
        return tuple(name for name in self.manifest.get("tensors", ()) if name.startswith(STATES))

    @property
    def updates(self) -> int:
        """See `Source`."""
        return int(self.manifest.get("updates", 0))

    @property
    def files(self) -> dict[str, str]:
        """Name and text of the files that the manifest lists, such as the tokenizer's, where they are there."""
        listed = (self.path / name for name in self.manifest["files"])
        return {path.name: path.read_text() for path in listed if path.is_file()}
