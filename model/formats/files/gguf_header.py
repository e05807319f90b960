"""Reads the header of a GGUF file: values by key, and where the blocks of each tensor lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Every count and
length is compared with what is left of the file before anything is made of it.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from lockstep.model.formats.files.extents import BadFile, checked_tensor

_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_DIMS = 4
"""Dims of a tensor at most."""


@dataclass(frozen=True)
class Blocks:
    """A tensor of a GGUF file: rows of quantised blocks."""

    name: str
    shape: tuple[int, ...]
    """The innermost dim last."""
    kind: GGMLQuantizationType
    offset: int
    """In the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the last dim."""
        elements, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // elements * size

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape[:-1]) * self.row_bytes


class GGUFHeader:
    """The values and tensors that a GGUF file lists."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            BadFile: when the file is cut off, or is no GGUF file of a version that is read.
        """
        self.path = path
        with path.open("rb") as file:
            size = file.seek(0, 2)
            content: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        cursor = _Cursor(path, content)
        if cursor.take(4) != b"GGUF":
            raise _bad(path, "it does not begin with GGUF")
        if (version := cursor.number("<u4")) not in (2, 3):
            raise _bad(path, f"its version is {version}, and 2 and 3 are read")
        tensors, values = cursor.number("<u8"), cursor.number("<u8")
        self._values: dict[str, Any] = dict(cursor.unique(cursor.value_by_key() for _ in range(values)))
        listed = dict(cursor.unique(cursor.tensor() for _ in range(tensors)))
        alignment = self.value("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _bad(path, f"its alignment is {alignment}")
        start = -(-cursor.at // alignment) * alignment
        self.tensors = {n: Blocks(n, shape, kind, start + at) for n, (shape, kind, at) in listed.items()}
        for blocks in self.tensors.values():
            if blocks.offset + blocks.size > len(content):
                raise _bad(path, f"it ends before {blocks.name} does")

    def value(self, key: str, *default: Any) -> Any:
        """The value of a key: a number, a text, or a list of either.

        Raises:
            BadFile: when there is none, and no default.
        """
        if key not in self._values:
            if default:
                return default[0]
            raise BadFile(f"{self.path} lacks {key}")
        found = self._values[key]
        try:
            return [text.decode() for text in found] if isinstance(found, tuple) else _plain(found)
        except UnicodeDecodeError as error:
            raise BadFile(f"{key} in {self.path} is no text in UTF-8") from error


def _plain(found: Any) -> Any:
    if isinstance(found, bytes):
        return found.decode()
    return found.tolist() if isinstance(found, np.ndarray) else found


def _bad(path: Path, reason: str) -> BadFile:
    return BadFile(f"{path} is no whole GGUF file: {reason}")


class _Cursor:
    """Reads one thing after the other, none beyond the end of the file."""

    def __init__(self, path: Path, content: Any) -> None:
        self._path, self._content, self.at = path, content, 0

    def take(self, size: int) -> bytes:
        """The next bytes."""
        self.at += self._fits(size)
        return bytes(self._content[self.at - size : self.at])

    def number(self, dtype: str) -> Any:
        """The next number."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def text(self) -> bytes:
        """The next string."""
        (size,) = struct.unpack("<Q", self.take(8))
        return self.take(size)

    def name(self) -> str:
        """The next string, of a key or a tensor."""
        try:
            return self.text().decode()
        except UnicodeDecodeError as error:
            raise _bad(self._path, "a name in it is no text in UTF-8") from error

    def unique(self, found: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Pass on what has a name that did not come before."""
        seen = set()
        for name, value in found:
            if name in seen:
                raise _bad(self._path, f"it has {name} twice")
            seen.add(name)
            yield name, value

    def value_by_key(self) -> tuple[str, Any]:
        """A key and its value; texts stay bytes, and a tuple of them is a list of texts."""
        name, kind = self.name(), self.number("<u4")
        if kind != GGUFValueType.ARRAY:
            return name, self._value(kind)
        kind, count = self.number("<u4"), self.number("<u8")
        if kind == GGUFValueType.STRING:
            self._fits(8 * count)
            return name, tuple(self.text() for _ in range(count))
        dtype = self._dtype(kind)
        return name, np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def tensor(self) -> tuple[str, tuple[tuple[int, ...], GGMLQuantizationType, int]]:
        """A tensor's name, shape, type and offset after the header."""
        name, dims = checked_tensor(self.name(), self._path), self.number("<u4")
        if not 1 <= dims <= _DIMS:
            raise _bad(self._path, f"{name} has {dims} dims")
        shape = tuple(self.number("<u8") for _ in range(dims))[::-1]
        kind, offset = self.number("<u4"), self.number("<u8")
        if kind not in {*GGMLQuantizationType}:
            raise _bad(self._path, f"{name} has the unknown type {kind}")
        kind = GGMLQuantizationType(kind)
        if 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise _bad(self._path, f"{name} of type {kind.name} has the shape {shape}")
        return name, (shape, kind, offset)

    def _value(self, kind: int) -> Any:
        return self.text() if kind == GGUFValueType.STRING else self.number(self._dtype(kind).str)

    def _dtype(self, kind: int) -> np.dtype[Any]:
        if kind not in _NUMBERS:
            raise _bad(self._path, f"it has a value of the unknown type {kind}")
        return np.dtype(_NUMBERS[GGUFValueType(kind)])

    def _fits(self, size: int) -> int:
        if size > len(self._content) - self.at:
            raise _bad(self._path, f"it is cut off at byte {len(self._content)}")
        return size
