"""Verifies that a checkpoint is whole, or that two are equal; reads every byte, a part of a tensor at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.tensors import Box, Source, digest
from lockstep.model.config import ModelConfig
from lockstep.model.formats.registry import OpenModel, locate, recognise
from lockstep.model.formats.target import rows_of_part
from lockstep.model.weights.lora import merged
from lockstep.model.weights.names import logical_tensors

_READ = 16 << 20
"""Bytes of fp32 that are read at once."""

Progress = Callable[[int, int], object]
"""Is told the tensors that are done, and all of them."""


@dataclass(frozen=True)
class Found:
    """The result of a verification: faults as sentences, and how many tensors were read."""

    faults: tuple[str, ...]
    tensors: int
    notes: tuple[str, ...] = ()


def verify_checkpoint(name: str, against: str | None = None, progress: Progress = lambda done, total: None) -> Found:
    """Read a checkpoint to its last byte, or compare it with another.

    Raises:
        BadSource: when there is none of a known format; what is wrong inside of one is a fault.
    """
    opened, other = (None if n is None else _opened(n) for n in (name, against))
    broken = tuple(each for each in (opened, other) if isinstance(each, str))
    if broken or opened is None or isinstance(opened, str):
        return Found(broken, 0)
    if other is None or isinstance(other, str):
        return _whole(opened, progress)
    return _equal(opened, other, progress)


def _opened(name: str) -> OpenModel | str:
    """A checkpoint, or what keeps one of a known format from being opened."""
    location = locate(name)
    known = recognise(location)
    try:
        return known.open(location)
    except (ValueError, OSError, KeyError) as error:
        return str(error)


def names_of(source: Source, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, and of the optimizer state of each that has some."""
    shapes = logical_tensors(model)
    return shapes | {name: shapes[name.split("/", 1)[1]] for name in source.states}


def _whole(opened: OpenModel, progress: Progress) -> Found:
    source, model = opened.source, opened.config
    table = source.tensors if isinstance(source, Checkpoint) else {}
    shapes = names_of(source, model)
    faults = [f"the manifest lists {name}, which the model does not have" for name in table.keys() - shapes.keys()]
    faults += [f"the manifest does not list {name}" for name in shapes if table and name not in table]
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        faults += _faults(source, name, shape, table.get(name))
        progress(done, len(shapes))
    return Found(tuple(faults), len(shapes))


def _faults(source: Source, name: str, shape: tuple[int, ...], said: dict[str, Any] | None) -> Iterator[str]:
    """What is wrong with one tensor, as far as the first part that cannot be read."""
    if said is not None and tuple(said["shape"]) != shape:
        yield f"{name} has shape {tuple(said['shape'])}, and the model's is {shape}"
        return
    chunk = tuple(said["chunk"]) if said else (rows_of_part(shape, 4, _READ), *shape[1:])
    boxes = list(_grid(shape, chunk))
    digests = said["digests"] if said else [None] * len(boxes)
    if len(digests) != len(boxes):
        yield f"{name} has {len(digests)} digests in the manifest, and its {len(boxes)} chunks need as many"
        return
    for box, expected in zip(boxes, digests, strict=True):
        try:
            found = source.read(name, box)
        except (ValueError, OSError, KeyError) as error:
            yield f"{name} {_place(box)} cannot be read: {error}"
            return
        if expected is not None and digest(found) != expected:
            yield f"{name} {_place(box)} has other bytes than the manifest's digest says"


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Box]:
    """Boxes of a regular grid, in row-major order."""
    counts = [-(-n // c) for n, c in zip(shape, chunk, strict=True)]
    for index in np.ndindex(*counts):
        yield tuple((i * c, min((i + 1) * c, n)) for i, c, n in zip(index, chunk, shape, strict=True))


def _equal(one: OpenModel, other: OpenModel, progress: Progress) -> Found:
    """Compare what both have; weights must be the same, states may be only one's. Adapters of one alone are merged."""
    if one.config.lora != other.config.lora:
        one, other = _merged(one), _merged(other)
    shapes, others = (names_of(each.source, each.config) for each in (one, other))
    faults = [f"{name} is in one checkpoint alone" for name in sorted(shapes.keys() ^ others.keys()) if "/" not in name]
    common = [name for name in shapes if name in others]
    dtypes: set[str] = set()
    for done, name in enumerate(common, start=1):
        if shapes[name] != others[name]:
            faults.append(f"{name} has shape {shapes[name]} in one and {others[name]} in the other")
        else:
            faults += _difference(one.source, other.source, name, shapes[name], dtypes)
        progress(done, len(common))
    apart = sum("/" in name for name in shapes.keys() ^ others.keys())
    notes = [f"{apart} tensors of an optimizer's state are in one alone, and were not compared"] if apart else []
    notes += [f"dtypes differ ({pair}): values were compared" for pair in sorted(dtypes)]
    return Found(tuple(faults), len(common), tuple(notes))


def _merged(opened: OpenModel) -> OpenModel:
    config, source = merged(opened.config, opened.source)
    return replace(opened, source=source, config=config)


def _difference(one: Source, other: Source, name: str, shape: tuple[int, ...], dtypes: set[str]) -> Iterator[str]:
    """The first element that differs, if one does."""
    for box in _grid(shape, (rows_of_part(shape, 4, _READ), *shape[1:])):
        try:
            a, b = one.read(name, box), other.read(name, box)
        except (ValueError, OSError, KeyError) as error:
            yield f"{name} {_place(box)} cannot be read: {error}"
            return
        if a.dtype != b.dtype:
            dtypes.add(f"{a.dtype} and {b.dtype}")
        differs = _differs(a, b)
        if differs.any():
            place = np.unravel_index(int(differs.argmax()), differs.shape)
            index = [int(i) + start for i, (start, _) in zip(place, box, strict=True)]
            yield f"{name}{index} is {a[place]} in one and {b[place]} in the other"
            return


def _differs(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """Where the bits differ, or the values of arrays of different dtypes."""
    if a.dtype == b.dtype:
        bits = np.dtype(f"u{a.dtype.itemsize}")
        return np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
    wide, other = a.astype(np.float64), b.astype(np.float64)
    return ~((wide == other) | (np.isnan(wide) & np.isnan(other)))


def _place(box: Box) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in box) + "]"
