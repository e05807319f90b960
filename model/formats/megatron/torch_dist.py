"""Reads and writes torch.distributed.checkpoint folders chunk by chunk, without a process group.

`.metadata` is a pickle that lists tensors and their chunks, `__R_K.distcp` are chunks one after the other, each as
`torch.save` made it. Megatron-core adds `metadata.json`, which names the format, and what is no tensor: in `common.pt`
until 0.18, since then as one more object among the chunks. Nothing is unpickled that is not on a list here.
Format: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html.
"""

import io
import json
import math
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lockstep.distributed.checkpoint.file_names import checked_name, path_inside
from lockstep.distributed.checkpoint.tensors import Box, overlap, to_numpy, to_torch, within
from lockstep.model.formats.files.extents import checked_tensor, read_bytes, write_bytes
from lockstep.model.formats.files.reading import read_object, reading
from lockstep.model.formats.files.safe_unpickler import load_pickle, load_torch

BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
COMMON_OBJECT = "common_state/shard_0_1"
LARGEST_FILE = 4 << 30
"""Bytes after which another file is begun."""

_DCP = "torch.distributed.checkpoint"
_LISTED = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    f"{_DCP}.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    f"{_DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
}
"""By module: classes that a `.metadata` may hold."""


class BadTorchDist(ValueError):
    """A folder that is not a whole checkpoint of torch.distributed.checkpoint."""


@dataclass
class _Chunk:
    box: Box
    place: _StorageInfo


@dataclass
class _Stored:
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: dict[tuple[int, ...] | None, list[_Chunk]] = field(default_factory=dict)
    """By index on all dims but the last two, where a chunk has one; None: the others."""

    def add(self, chunk: _Chunk) -> None:
        single = all(stop - start == 1 for start, stop in chunk.box[:-2])
        index = tuple(start for start, _ in chunk.box[:-2]) if single else None
        self.chunks.setdefault(index, []).append(chunk)

    def near(self, box: Box) -> list[_Chunk]:
        """Chunks that may have a part in a box of one place on each dim but the last two."""
        return self.chunks.get(tuple(start for start, _ in box[:-2]), []) + self.chunks.get(None, [])


class TorchDist:
    """The tensors of a folder; a read touches only the chunks that it needs."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            BadTorchDist: when a file is missing or of another format.
            UnreadFile: when one is damaged, or holds a class that is not listed.
        """
        self.folder = folder
        backend = read_object(self._path("metadata.json")).get("sharded_backend")
        if backend != BACKEND["sharded_backend"]:
            raise BadTorchDist(f"{folder} has the format {backend!r}: save it with --ckpt-format torch_dist")
        metadata = _metadata(self._path(".metadata"))
        with reading(folder / ".metadata"):
            self._tensors = _tensors(metadata)
            self._objects = {
                index.fqn: _checked(place)
                for index, place in metadata.storage_data.items()
                if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
            }
        self.shapes = {name: stored.shape for name, stored in self._tensors.items()}
        self.names = (*self._tensors, *self._objects)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""
        return self._tensors[name].dtype

    def empty(self, name: str, box: Box) -> NDArray[Any]:
        """Room for a box of a tensor, in the dtype that it is stored in.

        Raises:
            BadTorchDist: when NumPy has no such dtype.
        """
        try:
            return to_numpy(torch.empty([stop - start for start, stop in box], dtype=self.dtype(name)))
        except TypeError as error:
            raise BadTorchDist(
                f"{name} in {self.folder} has the dtype {self.dtype(name)}, which is not read"
            ) from error

    def common(self) -> dict[str, Any]:
        """What was saved beside the tensors."""
        if COMMON_OBJECT in self._objects:
            what = f"{COMMON_OBJECT} in {self.folder}"
            with reading(what):
                found = load_torch(self._bytes(self._objects[COMMON_OBJECT]), what)[0]
        else:
            what = str(self._path("common.pt"))
            found = load_torch(Path(what).read_bytes(), what)
        if not isinstance(found, dict):
            raise BadTorchDist(f"{what} holds {type(found).__name__}, and was to hold values by name")
        return found

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """Read a box of one tensor, of size 1 on each dim but the last two.

        Raises:
            BadTorchDist: when chunks are missing or cut off.
        """
        stored = self._tensors[name]
        parts = {i: common for i, chunk in enumerate(stored.near(box)) if (common := overlap(chunk.box, box))}
        found, wanted = sum(map(_volume, parts.values())), _volume(box)
        if found != wanted:
            raise BadTorchDist(f"{self.folder} holds {found} of the {wanted} values of {name} at {box}")
        out = self.empty(name, box)
        for i, common in parts.items():
            chunk = stored.near(box)[i]
            out[within(common, box)] = self._chunk(name, chunk, stored.dtype)[within(common, chunk.box)]
        return out

    def _chunk(self, name: str, chunk: _Chunk, dtype: torch.dtype) -> NDArray[Any]:
        what = f"{name} in {chunk.place.relative_path} of {self.folder}"
        if getattr(chunk.place, "transform_descriptors", None):
            raise BadTorchDist(f"{what} is compressed: save without transforms")
        tensor = load_torch(self._bytes(chunk.place), what)
        shape = tuple(stop - start for start, stop in chunk.box)
        if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise BadTorchDist(f"{what} is not the tensor {shape} of {dtype} that .metadata lists")
        return to_numpy(tensor)

    def _bytes(self, place: _StorageInfo) -> bytes:
        path = self._path(place.relative_path)
        missing = place.offset + place.length - path.stat().st_size
        if missing > 0:
            raise BadTorchDist(f"{path} ends {missing} bytes before its chunk does: copy the folder again")
        return read_bytes(path, place.offset, place.length).tobytes()

    def _path(self, name: str) -> Path:
        path = path_inside(self.folder, name, self.folder / ".metadata")
        if not path.is_file():
            raise BadTorchDist(f"{self.folder} lacks {name}: give a folder that Megatron saved whole")
        return path


def _tensors(metadata: Metadata) -> dict[str, _Stored]:
    tensors, sizes = {}, {}
    for name, said in metadata.state_dict_metadata.items():
        checked_tensor(name, Path(".metadata"))
        if isinstance(said, TensorStorageMetadata):
            tensors[name] = _Stored(_sizes(said.size), said.properties.dtype)
            sizes[name] = {tuple(chunk.offsets): _sizes(chunk.sizes) for chunk in said.chunks}
    for index, place in metadata.storage_data.items():
        if index.fqn in tensors:
            offset = _sizes(index.offset or ())
            box = tuple((start, start + size) for start, size in zip(offset, sizes[index.fqn][offset], strict=True))
            tensors[index.fqn].add(_Chunk(box, _checked(place)))
    return tensors


def _sizes(said: Iterable[int]) -> tuple[int, ...]:
    sizes = tuple(said)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise TypeError(f"sizes {sizes}")
    return sizes


def _checked(place: _StorageInfo) -> _StorageInfo:
    """A chunk's place, whose numbers are numbers and whose file lies in the folder."""
    checked_name(place.relative_path, ".metadata")
    _sizes((place.offset, place.length))
    return place


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _metadata(path: Path) -> Metadata:
    with path.open("rb") as file:
        found = load_pickle(file, _LISTED, str(path))
    if not isinstance(found, Metadata):
        raise BadTorchDist(f"{path} holds {type(found).__name__}, not the description of a checkpoint")
    return found


@dataclass(frozen=True)
class Piece:
    """A chunk to be written."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    """Of the chunk."""
    dtype: torch.dtype


class Writer:
    """Writes a folder: all chunks are listed first, then written in any order; `close` makes it a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[str, list[_StorageInfo]] = {}
        self._ends = [0]
        self._empty: tuple[str, ...] = ()

    def place(self, piece: Piece) -> _StorageInfo:
        """List a chunk; returns its file and offset."""
        described = TensorStorageMetadata(TensorProperties(piece.dtype), torch.Size(piece.shape), [])
        chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.extent))
        self._tensors.setdefault(piece.name, described).chunks.append(chunk)
        place = self._next(_saved_size(piece.extent, piece.dtype))
        self._places.setdefault(piece.name, []).append(place)
        return place

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors listed so far."""
        return tuple(self._tensors)

    def alias(self, name: str, of: str) -> None:
        """List another name of a listed tensor; its chunks are stored once."""
        self._tensors[name], self._places[name] = self._tensors[of], self._places[of]

    def add_empty(self, names: Iterable[str]) -> None:
        """List empty objects: Megatron looks for an `_extra_state` beside each linear layer."""
        self._empty = tuple(names)

    def create(self) -> None:
        """Create the files; content that exists stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, end in enumerate(self._ends):
            with (self.folder / _file(number)).open("ab") as file:
                file.truncate(end)

    def write(self, place: _StorageInfo, array: NDArray[Any]) -> None:
        """Write a chunk, and wait until it is on disk."""
        buffer = io.BytesIO()
        torch.save(to_torch(np.ascontiguousarray(array)), buffer)
        assert buffer.tell() == place.length, place
        write_bytes(self.folder / place.relative_path, place.offset, np.frombuffer(buffer.getbuffer(), np.uint8))

    def close(self, common: dict[str, Any]) -> None:
        """Write the metadata files; `metadata.json` comes last."""
        buffer = io.BytesIO()
        torch.save([None], buffer)
        nothing = self._next(buffer.tell())
        with (self.folder / nothing.relative_path).open("ab") as file:
            file.truncate(nothing.offset)
            file.write(buffer.getbuffer())
        torch.save(common, self.folder / "common.pt")
        with (self.folder / ".metadata").open("wb") as file:
            pickle.dump(self._described(nothing), file)
        (self.folder / "metadata.json").write_text(json.dumps(BACKEND | {"common_backend_version": 1}))

    def _next(self, length: int) -> _StorageInfo:
        """Room at the end of the last file, or in a new one."""
        if self._ends[-1] > LARGEST_FILE:
            self._ends.append(0)
        place = _StorageInfo(_file(len(self._ends) - 1), self._ends[-1], length)
        self._ends[-1] += length
        return place

    def _described(self, nothing: _StorageInfo) -> Metadata:
        objects = {MetadataIndex(name): nothing for name in self._empty}
        described: dict[str, Any] = {name: BytesStorageMetadata() for name in self._empty}
        return Metadata({**self._tensors, **described}, storage_data=dict(self._placed()) | objects)

    def _placed(self) -> Iterator[tuple[MetadataIndex, _StorageInfo]]:
        for name, places in self._places.items():
            for i, (chunk, place) in enumerate(zip(self._tensors[name].chunks, places, strict=True)):
                yield MetadataIndex(name, chunk.offsets, i), place


def _file(number: int) -> str:
    return f"__0_{number}.distcp"


@lru_cache
def _saved_size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor as `torch.save` makes them."""
    buffer = io.BytesIO()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), buffer)
    return len(buffer.getbuffer())
