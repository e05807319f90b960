"""Checkpoint arrays: one zarr3 array per tensor, through TensorStore; each chunk is written by the rank that has it."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore
from numpy.typing import NDArray
from torch import Tensor

from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.checkpoint.tensors import Box, WeightsOnly, digest, to_numpy

LARGEST_CHUNK = 64 << 20
"""Bytes of a chunk at most: a chunk is a file, which one rank writes."""
LARGEST_INNER = 1 << 18
"""Bytes of an inner chunk at most: what a reader of a slice reads whole, and checks."""
THREADS = 4
"""That compute digests and wait for the disk."""
UNDER_WAY = 512 << 20
"""Bytes that may be handed to TensorStore and not be on disk yet."""

_METADATA = "zarr.json"
_SYNCED_HERE = tensorstore.Context({"file_io_sync": False})

Entry = dict[str, Any]
"""Of an array in the manifest: `shape`, `dtype`, `chunk` (its shape) and `digests` of chunks by their numbers."""


@dataclass(frozen=True)
class Chunk:
    """One whole chunk of a zarr array, with its values."""

    name: str
    shape: tuple[int, ...]
    """Of the array."""
    grid: tuple[int, ...]
    """Of a chunk; the last of a dim may be smaller."""
    box: Box
    """Where in the array this one lies."""
    values: Tensor
    """As large as `box`."""

    @property
    def number(self) -> int:
        """Its index among all chunks of the array, in row-major order."""
        counts = [-(-size // step) for size, step in zip(self.shape, self.grid, strict=True)]
        return int(np.ravel_multi_index(self._places, counts)) if self.shape else 0

    @property
    def key(self) -> str:
        """Name of its file in the array's folder."""
        return ".".join(["c", *map(str, self._places)])

    @property
    def _places(self) -> list[int]:
        """Its place in each dim."""
        return [start // step for (start, _), step in zip(self.box, self.grid, strict=True)]


def chunk_shape(shape: Sequence[int], tile: Sequence[int], item_bytes: int) -> tuple[int, ...]:
    """The shape of an array's chunks: they subdivide the tiles of a layout, so that no two ranks write into one chunk.

    Rows are split first. A tensor whose rows are one tile may have a chunk that is larger than what is left for it.
    """
    rows, row_bytes = tile[0], math.prod(tile[1:]) * item_bytes
    if rows == shape[0]:
        rows = _rounded(rows, row_bytes)
    return (_halved(rows, row_bytes, LARGEST_CHUNK), *tile[1:])


def inner_shape(chunk: Sequence[int], item_bytes: int) -> tuple[int, ...]:
    """The shape of the inner chunks of a chunk (zarr's sharding codec)."""
    return (_halved(chunk[0], math.prod(chunk[1:]) * item_bytes, LARGEST_INNER), *chunk[1:])


def _rounded(rows: int, row_bytes: int) -> int:
    """Rows, and as many more as it takes to halve them into inner chunks."""
    parts = 1
    while 2 * parts <= rows and -(-rows // parts) * row_bytes > LARGEST_INNER:
        parts *= 2
    return -(-rows // parts) * parts


def _halved(rows: int, row_bytes: int, limit: int) -> int:
    """Rows, halved until they are no larger than a limit, or odd."""
    while rows % 2 == 0 and rows * row_bytes > limit:
        rows //= 2
    return rows


def write(folder: Storage, chunks: Iterable[Chunk]) -> dict[str, Entry]:
    """Write chunks to disk, sync them, and return their arrays' entries for the manifest.

    Chunks may come from a generator: few exist at a time. A file is synced by threads of its own as soon as it is
    written: within TensorStore, whose threads would wait for the disk, nothing is encoded meanwhile.

    Raises:
        ValueError: when a chunk comes twice.
    """
    arrays: dict[str, Any] = {}
    entries: dict[str, Entry] = {}
    under_way: deque[tuple[Chunk, Future[str]]] = deque()

    def settle() -> int:
        chunk, settled = under_way.popleft()
        entries[chunk.name]["digests"][chunk.number] = settled.result()
        return chunk.values.nbytes

    with ThreadPoolExecutor(THREADS) as threads:
        held = 0
        for chunk in chunks:
            values = to_numpy(chunk.values)
            entry = entries.setdefault(chunk.name, _entry(chunk, values.dtype))
            if chunk.number in entry["digests"]:
                raise ValueError(f"a chunk of {chunk.name} was written twice")
            entry["digests"][chunk.number] = ""
            if chunk.name not in arrays:
                new = _new(folder, chunk, values.dtype)
                arrays[chunk.name] = tensorstore.open(new, create=True, open=True, context=_SYNCED_HERE)
            place = arrays[chunk.name].result()[_slices(chunk.box)]
            writing = place.write(values, can_reference_source_data_indefinitely=True)
            under_way.append((chunk, threads.submit(_settled, folder, chunk, values, writing)))
            held += values.nbytes
            while held > UNDER_WAY:
                held -= settle()
        while under_way:
            settle()
        list(threads.map(_sync, {folder / name for name in arrays}))
    for above in {name.rpartition("/")[0] for name in arrays}:
        (folder / above if above else folder).sync()
    return entries


def _settled(folder: Storage, chunk: Chunk, values: NDArray[Any], writing: Any) -> str:
    """The digest of a chunk, as soon as its file is on disk."""
    found = digest(values)
    writing.result()
    (folder / chunk.name).sync(chunk.key)
    return found


def _sync(array: Storage) -> None:
    """Have what describes an array on disk, and the names of its chunks, which are there already."""
    array.sync(_METADATA)
    array.sync()


def _entry(chunk: Chunk, dtype: np.dtype) -> Entry:
    return {"shape": list(chunk.shape), "dtype": str(dtype), "chunk": list(chunk.grid), "digests": {}}


def merged(parts: Iterable[dict[str, Entry]]) -> dict[str, Entry]:
    """Merge the entries of several writers of the same arrays into those of the manifest; digests become lists.

    Raises:
        ValueError: when a chunk was written twice or by nobody.
    """
    arrays: dict[str, Entry] = {}
    for part in parts:
        for name, entry in part.items():
            known = arrays.setdefault(name, entry | {"digests": {}})
            digests = {int(number): text for number, text in entry["digests"].items()}
            if known["digests"].keys() & digests.keys():
                raise ValueError(f"a chunk of {name} was written twice")
            known["digests"] |= digests
    for name, entry in arrays.items():
        count = chunk_count(entry)
        if sorted(entry["digests"]) != list(range(count)):
            raise ValueError(f"{name} has {count} chunks, and {len(entry['digests'])} were written")
        entry["digests"] = [entry["digests"][number] for number in range(count)]
    return dict(sorted(arrays.items()))


def chunk_count(entry: Entry) -> int:
    """The number of chunks of an array."""
    return math.prod(-(-size // step) for size, step in zip(entry["shape"], entry["chunk"], strict=True))


def _spec(folder: Storage, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": (folder / name).kvstore}


def _new(folder: Storage, chunk: Chunk, dtype: np.dtype) -> dict[str, Any]:
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    inner = {
        "chunk_shape": list(inner_shape(chunk.grid, dtype.itemsize)),
        "codecs": checked,
        "index_codecs": checked,
        "index_location": "end",
    }
    metadata = {
        "shape": list(chunk.shape),
        "data_type": str(dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk.grid)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }
    # A chunk of zeros is written, too: one that is not there is lost, and not zero.
    return _spec(folder, chunk.name) | {"metadata": metadata, "store_data_equal_to_fill_value": True}


class ArrayFolder(WeightsOnly):
    """A `Source` over a folder of zarr arrays; a read touches only the chunks that it needs, in any layout."""

    def __init__(self, folder: Storage) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`. The checksum of every chunk that is read is verified.

        Raises:
            BadArray: when a chunk that is needed is missing or damaged.
        """
        part: NDArray[Any] = self._result(name, lambda array: array[_slices(box)].read())
        return part

    def read_into(self, name: str, box: Box, into: NDArray[Any]) -> None:
        """See `ReadsInto`; raises as `read` does."""
        room = tensorstore.array(into, copy=False, write=True)
        to_zero = tensorstore.d[:].translate_to[0]
        self._result(name, lambda array: room.write(tensorstore.cast(array, room.dtype)[_slices(box)][to_zero]))

    def _result(self, name: str, work: Callable[[Any], Any]) -> Any:
        """What work on an array, which goes on by itself, comes to."""
        if name not in self._open:
            if not self.folder.has(f"{name}/{_METADATA}"):
                raise KeyError(f"{self.folder} has no tensor {name}")
            self._open[name] = self._opened(name)
        try:
            return work(self._open[name]).result()
        except ValueError as error:
            raise BadArray(f"{self.folder / name} has a chunk that is missing or damaged: {error}") from error

    def _opened(self, name: str) -> Any:
        spec = _spec(self.folder, name) | {"fill_missing_data_reads": False}
        try:
            return tensorstore.open(spec, open=True, read=True).result()
        except ValueError as error:
            raise BadArray(f"{self.folder / name}/{_METADATA} is damaged: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in box)


class BadArray(ValueError):
    """An array on disk with a missing or damaged chunk."""
