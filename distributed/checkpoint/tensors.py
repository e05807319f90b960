"""Logical tensors, the pieces of them in local parameters, and `Source`, through which all of them are read.

A logical tensor belongs to a model, whatever the layout; a piece is a rectangle of one inside a local parameter.
Saving, loading, conversion and weight sync all work on pieces and read from a `Source`.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import xxhash
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from torch import Tensor

Box = tuple[tuple[int, int], ...]
"""Half-open interval [start, stop) on each dim."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of a logical tensor, and its position in a local parameter."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole logical tensor, without padding."""
    box: Box
    """Which part of the logical tensor this is."""
    local: Box
    """Where that part lies in the parameter: as large as `box`, after leading dims of one place each in a stack."""
    tile: tuple[int, ...]
    """Size of the regular tiles that this piece is one of; the last tile of a dim may be smaller."""
    first: bool = True
    """Whether this is the first of the equal copies that ranks of the tensor axis, or tied stages, hold."""
    owned: bool = True
    """Whether it is the first of all copies, those of replicas included."""

    def view(self, parameter: Tensor) -> Tensor:
        """The part of the parameter that this piece is."""
        part = parameter.detach()[tuple(slice(a, b) for a, b in self.local)]
        return part.view([b - a for a, b in self.box])


STATES = ("master", "exp_avg", "exp_avg_sq", "momentum", "old", "fisher")
"""Kinds of an optimizer's state: fp32 weights where the model's are not, Adam's moments, Muon's averaged gradients, and
what a penalty on the weights keeps: old weights, and how much each of them mattered (`WeightPenalty`)."""


READERS = 16
"""Threads that read at a time."""

T = TypeVar("T")


def state_name(kind: str, name: str) -> str:
    """The name of a logical tensor's optimizer state of one kind; it has the tensor's shape, in fp32."""
    return f"{kind}/{name}"


class Source(Protocol):
    """A readable set of logical tensors: a checkpoint, a Hugging Face folder, another process's weights."""

    @property
    def states(self) -> Sequence[str]:
        """Names of its optimizer state, as `state_name` makes them; empty where there are only weights."""
        ...

    @property
    def updates(self) -> int:
        """The number of updates of that state, for Adam's bias correction."""
        ...

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """Read the part `box` of a logical tensor, or of its optimizer state.

        Raises:
            KeyError: when there is no such tensor.
        """
        ...


@runtime_checkable
class ReadsInto(Protocol):
    """A `Source` that can read into an existing array, without a temporary one."""

    def read_into(self, name: str, box: Box, into: NDArray[Any]) -> None:
        """As `Source.read`, into an array of that shape, and of any dtype that has all numbers of the tensor's."""
        ...


def read_tensor(source: Source, name: str, box: Box, into: Tensor) -> None:
    """Read a part of a logical tensor, or of its optimizer's state, into a tensor of that shape on any device."""
    if isinstance(source, ReadsInto) and into.device.type == "cpu":
        source.read_into(name, box, memory_of(into))
    else:
        into.copy_(to_torch(source.read(name, box)))


def concurrently(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Call work(item) for every item in a pool of READERS threads: reads wait for disks and networks."""
    with ThreadPoolExecutor(READERS) as readers:
        for _ in readers.map(work, items):
            pass


class WeightsOnly:
    """Base class of a `Source` without optimizer state."""

    states: Sequence[str] = ()
    updates: int = 0


def whole(shape: tuple[int, ...]) -> Box:
    """The box that covers a tensor of this shape."""
    return tuple((0, n) for n in shape)


def overlap(a: Box, b: Box) -> Box | None:
    """The common part of two boxes, or None."""
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def within(part: Box, outer: Box) -> tuple[slice, ...]:
    """Slices that select `part` from an array that holds `outer`."""
    return tuple(slice(p[0] - o[0], p[1] - o[0]) for p, o in zip(part, outer, strict=True))


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as an array; bfloat16 becomes ml_dtypes.bfloat16."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(bfloat16)
    return tensor.contiguous().numpy()


def memory_of(tensor: Tensor) -> NDArray[Any]:
    """The memory of a tensor in host memory, to be read and written."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()


def to_torch(array: NDArray[Any]) -> Tensor:
    """The array's memory as a tensor, or a copy of it where the array may not be written."""
    array = array if array.flags.writeable and array.flags.c_contiguous else np.array(array)
    if array.dtype == bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def digest(array: NDArray[Any]) -> str:
    """xxh3-64 of an array's bytes, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).view(np.uint8).data)
