"""Reads and writes safetensors files by slices: the header first, then each tensor at its offset.

Format: https://huggingface.co/docs/safetensors/index#format. The library of that name writes a file from tensors that
are all in memory, which does not suit one of 5 GB.
"""

import json
import math
from collections.abc import Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from lockstep.model.formats.files.extents import BadFile, Extent, checked_tensor, read_bytes

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}

_LONGEST_HEADER = 100_000_000
"""Bytes of a header at most, as in the library."""

_NO_SIZE = 1 << 63

Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Shape and dtype of each tensor of a file."""


def read_header(path: Path) -> dict[str, Extent]:
    """The extent of each tensor of a file, by name.

    Raises:
        BadFile: when the file is no safetensors file, is cut off, or has a dtype that is not known here.
    """
    size = path.stat().st_size
    length = int(read_bytes(path, 0, 8).view("<u8")[0]) if size >= 8 else size
    if length > min(size - 8, _LONGEST_HEADER):
        raise BadFile(f"{path} is cut off, or no safetensors file: its {size} bytes do not hold its own header")
    try:
        listed = json.loads(read_bytes(path, 8, length).tobytes(), object_pairs_hook=_unique)
        found = {n: _extent(path, n, words, 8 + length) for n, words in listed.items() if n != "__metadata__"}
    except (UnicodeDecodeError, JSONDecodeError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise BadFile(f"{path} is no safetensors file: its header cannot be read ({error!r})") from error
    end = max((extent.offset + extent.size for extent in found.values()), default=0)
    if end > size:
        raise BadFile(f"{path} is cut off: it has {size} bytes, and its tensors end at {end}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise KeyError("a name is there twice")
    return found


def _extent(path: Path, name: str, words: dict[str, Any], data: int) -> Extent:
    checked_tensor(name, path)
    if words["dtype"] not in _DTYPES:
        raise BadFile(f"{name} in {path} has dtype {words['dtype']!r}: supported are {', '.join(_DTYPES)}")
    shape, (start, stop) = tuple(words["shape"]), words["data_offsets"]
    if not all(type(n) is int and 0 <= n < _NO_SIZE for n in (*shape, start, stop)):
        raise BadFile(f"{name} in {path} has the shape {shape} and lies from {start!r} to {stop!r}, which cannot be")
    extent = Extent(path, data + start, shape, _DTYPES[words["dtype"]])
    if extent.size != stop - start:
        raise BadFile(f"{name} in {path} has {stop - start} bytes, and its shape {extent.shape} needs {extent.size}")
    return extent


def layout(path: Path, tensors: Shapes) -> tuple[bytes, dict[str, Extent]]:
    """The header of a new file, and the extent of each tensor; wider items come first, so that all are aligned."""
    words: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda tensor: -tensor[1][1].itemsize):
        size = math.prod(shape) * dtype.itemsize
        words[name] = {"dtype": _WORDS[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(words, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    del words["__metadata__"]
    return header, {name: _extent(path, name, said, len(header)) for name, said in words.items()}
