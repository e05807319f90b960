"""A folder of checkpoints: `step-000120` folders that are whole or do not exist, and `latest`, a link to the newest."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.distributed.checkpoint.spec import STATES
from lockstep.distributed.checkpoint.store import ArrayFolder, Entry

FORMAT = 2
_NAME = re.compile(r"step-(\d{6,})")


class BadCheckpoint(ValueError):
    """A folder that is not a whole checkpoint of a version that this program reads."""


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint that nobody takes for one as soon as that begins."""
    going = checkpoint.with_name(f"{checkpoint.name}.partial")
    checkpoint.rename(going)
    shutil.rmtree(going)


def link(checkpoint: Path, name: str) -> None:
    """Let a link beside a checkpoint point to it."""
    new = checkpoint.parent / f"{name}.{os.getpid()}"
    new.unlink(missing_ok=True)
    new.symlink_to(checkpoint.name)
    new.replace(checkpoint.parent / name)
    sync(checkpoint.parent)


def sync(path: Path) -> None:
    """Return when what a file holds, or a folder lists, is on disk."""
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
        steps = saved(place)
        if steps:
            return steps[max(steps)]
    raise BadCheckpoint(f"{path} holds no checkpoint: give a folder with a manifest.json, or a run that saved one")


def saved(checkpoints: Path) -> dict[int, Path]:
    """The whole checkpoints of a folder, by step."""
    names = {p: _NAME.fullmatch(p.name) for p in checkpoints.glob("step-*") if (p / "manifest.json").is_file()}
    return {int(match[1]): path for path, match in names.items() if match}


def drop_after(checkpoints: Path, step: int) -> None:
    """Remove the checkpoints of later steps, which a run has taken back; `latest` is the newest that is left."""
    steps = saved(checkpoints)
    left = [s for s in steps if s <= step]
    if left:
        link(steps[max(left)], "latest")
    elif steps:
        (checkpoints / "latest").unlink()
    for later in steps.keys() - left:
        remove(steps[later])
    if not (checkpoints / "best").exists():
        (checkpoints / "best").unlink(missing_ok=True)


class Checkpoint:
    """A `Source` over a saved checkpoint, with what its manifest says."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            BadCheckpoint: when the path holds none, or one of a newer format.
        """
        self.path = find(path)
        file = self.path / "manifest.json"
        try:
            self.manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadCheckpoint(f"{file} is damaged: {error}") from error
        if self.manifest.get("format") != FORMAT:
            raise BadCheckpoint(
                f"{self.path} has format {self.manifest.get('format')}, and this program reads format {FORMAT}"
            )
        arrays = ArrayFolder(self.path / "arrays")
        self.read, self.read_into = arrays.read, arrays.read_into

    @property
    def tensors(self) -> Mapping[str, Entry]:
        """Shape, dtype, chunks and digests of every array, by name."""
        entries: dict[str, Entry] = self.manifest["tensors"]
        return entries

    @property
    def states(self) -> Sequence[str]:
        """See `Source`."""
        return tuple(name for name in self.tensors if name.startswith(tuple(f"{kind}/" for kind in STATES)))

    @property
    def updates(self) -> int:
        """See `Source`."""
        return int(self.manifest.get("updates", 0))

    @property
    def files(self) -> dict[str, str]:
        """Name and text of the files that the manifest lists, such as the tokenizer's, where they are there."""
        listed = (self.path / name for name in self.manifest["files"])
        return {path.name: path.read_text() for path in listed if path.is_file()}
