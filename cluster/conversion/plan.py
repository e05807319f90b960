"""Plans a conversion: source, destination, format, memory limit, and the parts that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from lockstep.cluster.conversion.memory import in_words
from lockstep.distributed.checkpoint.manager import MANIFEST
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.checkpoint.tensors import Source, WeightsOnly
from lockstep.model.formats.huggingface.writer import SHARD_BYTES
from lockstep.model.formats.recast import Recast
from lockstep.model.formats.registry import TARGETS, BadSource, OpenModel
from lockstep.model.formats.target import LARGEST_PART, Part, Target, Wanted
from lockstep.model.weights.lora import merged

MAX_MEMORY = 8 * 10**9
"""Bytes that a conversion may need, unless told otherwise."""

_COPIES = 8
"""Times that a part may be in memory: as read, cast, encoded, on its way to the disk; and what allocators keep."""

_FIXED = 64 << 20
"""Bytes that a process may need for threads, open files and the names of tensors."""


class BadConversion(ValueError):
    """A conversion that cannot be done, or did not finish."""


class TooMuchMemory(BadConversion):
    """A conversion that would need, or needs, more memory than it was allowed."""


@dataclass(frozen=True)
class Conversion:
    """Source, destination, format and dtype of a conversion, and the memory and processes that it may use."""

    source: str
    destination: Path | Storage
    to: str
    dtype: str | None = None
    shard_bytes: int = SHARD_BYTES
    max_memory: int = MAX_MEMORY
    workers: int = 1
    weights_only: bool = False

    @property
    def part_bytes(self) -> int:
        """Size of the largest part, in bytes, that keeps every worker within its share of the memory.

        Raises:
            TooMuchMemory: when even small parts would not.
        """
        room = (self.max_memory // self.workers - _FIXED) // _COPIES
        if room < 1 << 20:
            needed = in_words(self.workers * (_FIXED + (_COPIES << 20)))
            raise TooMuchMemory(
                f"max_memory={in_words(self.max_memory)} is too little for workers={self.workers}: give {needed} "
                "or more, or fewer workers"
            )
        return min(LARGEST_PART, 1 << (room.bit_length() - 1))


class Weights(WeightsOnly):
    """A `Source` of another's weights, without its optimizer state."""

    def __init__(self, source: Source) -> None:
        self.read = source.read


def chosen(conversion: Conversion, opened: OpenModel) -> Source:
    """The tensors that a conversion takes: all of a model's, or its weights without the optimizer's state."""
    return Weights(opened.source) if conversion.weights_only else opened.source


def target_of(conversion: Conversion, opened: OpenModel, folder: Path | Storage) -> tuple[Target, Recast]:
    """The target that writes into a folder, and the source as it is read for it: adapters merged, dtype cast."""
    source, model = chosen(conversion, opened), opened.config
    form = TARGETS[conversion.to]
    if not isinstance(folder, Path) and not form.to_stores:
        raise BadConversion(f"{form.title} is written to folders only, and {folder} is none: give a folder")
    if model.head == "value" and not form.has_values:
        raise BadConversion(f"{form.title} has no place for a value head: convert to lockstep or hf")
    if form.adapters == "merged":
        model, source = merged(model, source)
    recast = Recast(source, model, conversion.dtype, states=form.has_states)
    wanted = Wanted(model, recast, opened.files, conversion.shard_bytes, conversion.part_bytes, conversion.source)
    try:
        return form.target(folder, wanted), recast
    except KeyError as error:
        raise BadSource(str(error.args[0])) from error


def tasks_of(parts: Sequence[Part], limit: int) -> list[list[Part]]:
    """Group parts into tasks that one process writes: large parts alone, small ones together."""
    tasks: list[list[Part]] = []
    filled = limit + 1
    for part in parts:
        if filled + part.size > limit:
            tasks.append([])
            filled = 0
        tasks[-1].append(part)
        filled += part.size
    return tasks


def begun_with(conversion: Conversion, opened: OpenModel) -> dict[str, str | int | None]:
    """All settings that determine the bytes written; a conversion resumes only if they are the same."""
    root = opened.root
    return {
        "source": str(root.resolve() if isinstance(root, Path) else root),
        "source files": _fingerprint(root),
        "to": conversion.to,
        "dtype": conversion.dtype,
        "shard bytes": conversion.shard_bytes,
        "weights only": conversion.weights_only,
        "part bytes": conversion.part_bytes,
    }


def _fingerprint(root: Path | Storage) -> str:
    """Of the names, sizes and times of all files of a source; in a store, of the manifest, which has digests."""
    if not isinstance(root, Path):
        return xxhash.xxh3_64_hexdigest(root.read(MANIFEST).encode())
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    said = xxhash.xxh3_64()
    for path in files:
        status = path.stat()
        said.update(f"{path.relative_to(root.parent)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return said.hexdigest()
