"""Logical tensors on disk: one zarr3 array each, through TensorStore; every rank writes the pieces that it owns."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from numpy.typing import NDArray
from torch import Tensor

from lockstep.distributed.checkpoint.spec import Box, Piece, WeightsOnly, to_numpy

LARGEST_CHUNK = 64 << 20
"""Bytes of a chunk at most, so that a reader of a small slice does not read a whole matrix."""


def _spec(folder: Path, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / name}/"}}


def chunk_shape(tile: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    """Chunks that subdivide the tiles of a layout, so that no two ranks write into one chunk: rows are split first."""
    rows, row_bytes = tile[0], math.prod(tile[1:]) * item_bytes
    parts = 1
    while rows % (parts * 2) == 0 and rows // parts * row_bytes > LARGEST_CHUNK:
        parts *= 2
    return (rows // parts, *tile[1:])


def write(folder: Path, held: Iterable[tuple[Tensor, Piece]]) -> None:
    """Write the owned pieces of this rank; returns when they are handed to the file system."""
    pending = []
    for parameter, piece in held:
        if not piece.owned:
            continue
        array = to_numpy(piece.view(parameter))
        target = _create(folder, piece, array.dtype)
        pending.append(target[tuple(slice(a, b) for a, b in piece.box)].write(array))
    for future in pending:
        future.result()


def _create(folder: Path, piece: Piece, dtype: np.dtype) -> Any:
    chunks = chunk_shape(piece.tile, dtype.itemsize)
    metadata = {
        "shape": list(piece.shape),
        "data_type": str(dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    spec = _spec(folder, piece.name) | {"metadata": metadata}
    return tensorstore.open(spec, create=True, open=True).result()


class ArrayFolder(WeightsOnly):
    """A `Source` over a folder of arrays; a read touches only the chunks that it needs, whatever layout wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`. The checksum of every chunk is verified."""
        if name not in self._open:
            if not (self.folder / name).is_dir():
                raise KeyError(f"{self.folder} has no tensor {name}")
            self._open[name] = tensorstore.open(_spec(self.folder, name), open=True, read=True).result()
        return self._open[name][tuple(slice(a, b) for a, b in box)].read().result()
