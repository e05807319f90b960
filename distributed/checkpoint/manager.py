"""A folder of checkpoints: `step-000120` folders, each complete or absent, and `latest`, a link to the newest."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.distributed.checkpoint.arrays import ArrayFolder, Entry
from lockstep.distributed.checkpoint.manifest import check_manifest, parsed_manifest
from lockstep.distributed.checkpoint.storage import Storage, storage_of
from lockstep.distributed.checkpoint.tensors import STATES

FORMAT = 2
MANIFEST = "manifest.json"
"""The last file that is written of a checkpoint: a folder that has it is complete."""
STEP = "step-"
_NAME = re.compile(rf"{STEP}(\d{{6,}})")


class BadCheckpoint(ValueError):
    """A folder that is not a complete checkpoint of a format version that this program reads."""


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"{STEP}{step:06d}"


def find(where: str | Path | Storage) -> Storage:
    """Find the checkpoint at a path or URL: itself, or the newest of a run or of a folder of checkpoints.

    Raises:
        BadCheckpoint: when there is none.
    """
    given = storage_of(where)
    for place in (given, given / "checkpoints"):
        if place.has(MANIFEST):
            return place
        steps = saved(place)
        if steps:
            return steps[max(steps)]
    raise BadCheckpoint(f"{given} holds no checkpoint: give a folder with a {MANIFEST}, or a run that saved one")


def exists(place: Storage) -> bool:
    """Whether a folder is a checkpoint, or holds some."""
    return place.has(MANIFEST) or bool(saved(place))


def saved(checkpoints: Storage) -> dict[int, Storage]:
    """The complete checkpoints of a folder, by step."""
    names = (_NAME.fullmatch(name) for name in checkpoints.holding(MANIFEST))
    return {int(match[1]): checkpoints / match[0] for match in names if match}


def drop_after(checkpoints: Storage, step: int) -> None:
    """Remove the checkpoints after a step, which a run has undone; `latest` then points to the newest that is left."""
    steps = saved(checkpoints)
    left = [s for s in steps if s <= step]
    gone = {steps[later].name: steps[later] for later in steps.keys() - left}
    if checkpoints.pointed("best") in gone:
        checkpoints.unlink("best")
    if left:
        checkpoints.point("latest", steps[max(left)].name)
    elif steps:
        checkpoints.unlink("latest")
    for later in gone.values():
        later.remove(MANIFEST)


class Checkpoint:
    """A `Source` over a saved checkpoint, with its manifest."""

    def __init__(self, where: str | Path | Storage) -> None:
        """
        Raises:
            BadCheckpoint: when the path or URL holds none, or one that is damaged or of a newer format.
        """
        self.place = find(where)
        self.manifest = _manifest(self.place)
        arrays = ArrayFolder(self.place / "arrays")
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
        """Name and text of the files that the manifest lists and that exist, such as the tokenizer's."""
        return {name: self.place.read(name) for name in self.manifest["files"] if self.place.has(name)}


def _manifest(place: Storage) -> dict[str, Any]:
    try:
        found = parsed_manifest(place.read(MANIFEST))
        if found.get("format") == FORMAT:
            check_manifest(found)
    except ValueError as error:
        raise BadCheckpoint(f"{place}/{MANIFEST} is damaged: {error}") from error
    if found.get("format") != FORMAT:
        raise BadCheckpoint(f"{place} has format {found.get('format')}, and this program reads format {FORMAT}")
    return found
