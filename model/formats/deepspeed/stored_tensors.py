"""Parameters as DeepSpeed's files store them: flat, in parts, memory-mapped and read when they are needed."""

import argparse
import errno
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy
import torch
from torch import Tensor

from lockstep.distributed.checkpoint.tensors import Box


class BadDeepSpeedFolder(ValueError):
    """A folder that is not a whole DeepSpeed checkpoint of a model that the reader understands."""


class Ignored:
    """Stands in for pickled classes whose content is not needed."""


_REBUILD_ARRAY = numpy.empty(0).__reduce__()[0]

_HARMLESS: list[Any] = [
    (Ignored, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    argparse.Namespace,
    numpy.dtype,
    numpy.ndarray,
    type(numpy.dtype(numpy.uint32)),
    type(numpy.dtype(numpy.int64)),
    type(numpy.dtype(numpy.float64)),
    (_REBUILD_ARRAY, "numpy.core.multiarray._reconstruct"),
    (_REBUILD_ARRAY, "numpy._core.multiarray._reconstruct"),
]
"""What DeepSpeed, and scripts that keep their arguments and random states, put into files beside tensors."""


def load(path: Path) -> Any:
    """Load a file of `torch.save`, its tensors memory-mapped; refuses classes other than tensors and harmless ones.

    Raises:
        BadDeepSpeedFolder: when the file is not whole, or holds a class that could run code.
    """
    known = torch.serialization.get_safe_globals()  # others' classes would be taken off the list behind the block
    with torch.serialization.safe_globals([each for each in _HARMLESS if each not in known]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UnpicklingError as error:
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            raise BadDeepSpeedFolder(
                f"{path} holds {foreign[1] if foreign else 'something'}, which could run code when it is read: "
                "save the checkpoint without it in client_state"
            ) from error
        except (RuntimeError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            raise BadDeepSpeedFolder(
                f"{path} is not a whole file: copy it again, or take another checkpoint"
            ) from error


def param(path: Path) -> Tensor:
    """Load the tensor of a file in a universal checkpoint."""
    found = load(path)
    found = found.get("param") if isinstance(found, dict) else found
    if not isinstance(found, Tensor):
        raise BadDeepSpeedFolder(f"{path} holds no tensor: copy it again, or take another checkpoint")
    return found


@dataclass(frozen=True)
class TensorFile:
    """A tensor in a file of its own, which is loaded when the tensor is read."""

    path: Path
    elements: int

    def numel(self) -> int:
        """Number of elements."""
        return self.elements

    def flatten(self) -> Tensor:
        """All elements."""
        found = param(self.path).flatten()
        if len(found) < self.elements:
            raise BadDeepSpeedFolder(f"{self.path} has {len(found)} of {self.elements} elements: copy it again")
        return found


@dataclass(frozen=True)
class FlatTensor:
    """A parameter's values as parts, which joined are the flattened parameter."""

    shape: tuple[int, ...]
    parts: Sequence[Tensor | TensorFile]
    """What is beyond the shape is padding."""
    dtype: torch.dtype
    """What values are rounded to."""

    @property
    def is_whole(self) -> bool:
        """Whether the parts cover all values."""
        return sum(part.numel() for part in self.parts) >= math.prod(self.shape)

    def read(self, box: Box) -> Tensor:
        """Read a box of the parameter; only its rows are read from disk."""
        row = math.prod(self.shape[1:])
        (first, last), *_ = box
        found = list(between(self.parts, first * row, last * row))
        rows = (found[0] if len(found) == 1 else torch.cat(found)).view(last - first, *self.shape[1:])
        return rows[(slice(None), *(slice(a, b) for a, b in box[1:]))].to(self.dtype)


def between(parts: Sequence[Tensor | TensorFile], start: int, stop: int) -> Iterator[Tensor]:
    """Elements [start, stop) of the concatenation of parts."""
    ends = itertools.accumulate(part.numel() for part in parts)
    for part, end in zip(parts, ends, strict=True):
        begin = end - part.numel()
        if begin < stop and end > start:
            yield part.flatten()[max(0, start - begin) : stop - begin]


@dataclass
class RankTensors:
    """Weights and optimizer state of one model-parallel rank, by the module's parameter names."""

    weights: dict[str, FlatTensor] = field(default_factory=dict)
    states: dict[str, dict[str, FlatTensor]] = field(default_factory=dict)
    """By kind of the optimizer's state; see `state_name`."""
    updates: int = 0

    def kinds(self, name: str) -> dict[str, FlatTensor]:
        """A parameter's weights and all of its optimizer state, by kind."""
        states = {kind: tensors[name] for kind, tensors in self.states.items() if name in tensors}
        return {"weights": self.weights[name]} | states

    def add(self, kind: str, name: str, shape: Sequence[int], parts: Sequence[Tensor | TensorFile]) -> None:
        """Add the fp32 values of a kind of a parameter's optimizer state."""
        self.states.setdefault(kind, {})[name] = FlatTensor(tuple(shape), parts, torch.float32)
