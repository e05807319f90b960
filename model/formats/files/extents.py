"""Tensors as byte ranges of files, read by slices; only the slice is in memory."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.tensors import Box

_BLOCK = 8 << 20
"""Bytes that are read at once where only some columns of the rows are wanted."""


class BadFile(ValueError):
    """A file that is damaged, or that is not in the format that its name says."""


def checked_tensor(name: object, path: Path) -> str:
    """Return the name that a file gives a tensor, if it is one.

    Raises:
        BadFile: for what is no text, is empty, or would break a line.
    """
    if not isinstance(name, str) or not name.isprintable() or not name:
        raise BadFile(f"{path} has a tensor that is called {str(name)[:80]!r}: it is damaged")
    return name


def read_bytes(path: Path, offset: int, size: int) -> NDArray[np.uint8]:
    """Read `size` bytes from `offset` on.

    Raises:
        BadFile: when the file ends before.
    """
    buffer = np.empty(size, np.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < size:
            got = os.preadv(descriptor, [buffer[done:].data], offset + done)
            if not got:
                raise BadFile(f"{path} is cut off: byte {offset + size} was to be read, and it ends at {offset + done}")
            done += got
    finally:
        os.close(descriptor)
    return buffer


def write_bytes(path: Path, offset: int, data: NDArray[np.uint8]) -> None:
    """Write bytes at an offset, and wait until they are on disk (fdatasync)."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        done = 0
        while done < data.size:
            done += os.pwrite(descriptor, data[done:].data, offset + done)
        os.fdatasync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Extent:
    """A contiguous row-major tensor in a file: path, offset, shape, dtype."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Size of the whole tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, box: Box) -> NDArray[Any]:
        """Read a box of the tensor.

        Raises:
            BadFile: when the file ends before it.
        """
        (start, stop), *columns = box
        if all(interval == (0, n) for interval, n in zip(columns, self.shape[1:], strict=True)):
            return self._rows(start, stop)
        out = np.empty([b - a for a, b in box], self.dtype)
        step = max(1, _BLOCK // self._row_size)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = self._rows(first, last)[:, *(slice(a, b) for a, b in columns)]
        return out

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Write rows from `start` on, and wait until they are on disk."""
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        write_bytes(self.path, self.offset + start * self._row_size, data)

    @property
    def _row_size(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        data = read_bytes(self.path, self.offset + start * self._row_size, (stop - start) * self._row_size)
        return data.view(self.dtype).reshape(stop - start, *self.shape[1:])
