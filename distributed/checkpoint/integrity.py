"""Finds the newest whole checkpoint of a folder, and says what is wrong with newer ones, before a run starts from it.

A file system that lost its last seconds leaves files that are gone, empty, cut off or full of zeros; a slip of the hand
leaves a folder without them. Chunks are compared with the manifest's digests, all of them in a checkpoint of moderate
size. Of a large one the index and the first inner chunk of each are read, whose checksums show whether a file is whole
and in place; the others are checked when ranks load them.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from lockstep.distributed.checkpoint.arrays import Entry
from lockstep.distributed.checkpoint.manager import FORMAT, MANIFEST, STEP, Checkpoint, saved
from lockstep.distributed.checkpoint.storage import Folder, Storage
from lockstep.distributed.checkpoint.tensors import Box, concurrently, digest

READ_WHOLE = 4 << 30
"""Bytes of a checkpoint of which all is read."""


@dataclass(frozen=True)
class NewestWhole:
    """The newest whole checkpoint of a folder, or none, and what is wrong with those after it."""

    place: Storage | None
    damaged: Mapping[int, str]
    """By step, newest first."""
    left: Storage | None = None
    """The newest checkpoint that was there and is gone, where its folder's `latest` still names it."""

    def __str__(self) -> str:
        return "; ".join(f"the checkpoint of step {step} is damaged: {reason}" for step, reason in self.damaged.items())


def newest_whole(checkpoints: Storage, beside: Callable[[Storage], str | None] = lambda place: None) -> NewestWhole:
    """Look for the newest whole checkpoint.

    Args:
        beside: says what else keeps a run from going on from a whole checkpoint, such as another model's that is gone.

    Raises:
        BadCheckpoint: where one of a newer format is found first.
    """
    damaged: dict[int, str] = {}
    places = _emptied(checkpoints) | saved(checkpoints)
    for step in sorted(places, reverse=True):
        reason = damage(places[step]) or beside(places[step])
        if reason is None:
            return NewestWhole(places[step], damaged)
        damaged[step] = reason
    return NewestWhole(None, damaged, None if places else _left(checkpoints))


def damage(place: Storage) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is whole.

    Raises:
        BadCheckpoint: for one of a newer format, which is not damaged.
    """
    if not place.has(MANIFEST):
        return f"it has no {MANIFEST}"
    if not _is_newer(place):
        try:
            Checkpoint(place)
        except ValueError:
            return f"its {MANIFEST} is damaged"
    checkpoint = Checkpoint(place)
    try:
        files, entries = list(checkpoint.manifest["files"]), checkpoint.tensors
        chunks = [(name, *chunk) for name, entry in entries.items() for chunk in _chunks(entry)]
        size = sum(math.prod(entry["shape"]) * _ITEM.get(entry["dtype"], 8) for entry in entries.values())
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"its {MANIFEST} is damaged"
    lost = [name for name in files if not _is_whole_file(place, name)]
    lost += _broken(checkpoint, chunks, whole=size <= READ_WHOLE)
    if not lost:
        return None
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return f"{lost[0]}{more} of its files and arrays are missing or damaged"


_ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a number."""


def _is_newer(place: Storage) -> bool:
    """Whether the manifest can be read and says another version of the format."""
    try:
        found = json.loads(place.read(MANIFEST))
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("format") not in (FORMAT, None)


def _chunks(entry: Entry) -> Iterator[tuple[Box, str]]:
    """The box and digest of each chunk of an array."""
    starts = [range(0, size, step) for size, step in zip(entry["shape"], entry["chunk"], strict=True)]
    for corner, stored in zip(product(*starts), entry["digests"], strict=True):
        limits = zip(corner, entry["chunk"], entry["shape"], strict=True)
        yield tuple((start, min(start + step, size)) for start, step, size in limits), stored


def _broken(checkpoint: Checkpoint, chunks: list[tuple[str, Box, str]], *, whole: bool) -> list[str]:
    """Names of arrays with chunks that cannot be read, or differ from what was saved."""
    broken: set[str] = set()

    def check(chunk: tuple[str, Box, str]) -> None:
        name, box, stored = chunk
        try:
            values = checkpoint.read(name, box if whole else tuple((start, start + 1) for start, _ in box))
        except (ValueError, KeyError, IndexError):
            broken.add(name)
            return
        if whole and digest(values) != stored:
            broken.add(name)

    concurrently(check, chunks)
    return sorted(broken)


def _is_whole_file(place: Storage, name: str) -> bool:
    """Whether a file exists, and has JSON in it where its name says so."""
    if not place.has(name):
        return False
    try:
        text = place.read(name)
        return not name.endswith(".json") or json.loads(text) is not None
    except ValueError:
        return False


def _emptied(checkpoints: Storage) -> dict[int, Storage]:
    """Folders of steps without a manifest: a save gives a folder its name when all is in it."""
    if not isinstance(checkpoints, Folder):
        return {}  # in a key-value store, an interrupted save leaves such ones
    names = (re.fullmatch(rf"{STEP}(\d{{6,}})", path.name) for path in checkpoints.path.glob(f"{STEP}*/"))
    return {int(match[1]): checkpoints / match[0] for match in names if match}


def _left(checkpoints: Storage) -> Storage | None:
    """What `latest` names in a folder that holds no checkpoint any more."""
    if isinstance(checkpoints, Folder):
        link = checkpoints.path / "latest"
        return checkpoints / link.readlink().name if link.is_symlink() else None
    name = checkpoints.pointed("latest")
    return checkpoints / name if name else None
