"""Casts a source to another dtype, with fp32 master weights kept in the optimizer state where they belong."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.tensors import Box, Source, state_name, to_numpy, to_torch
from lockstep.model.config import ModelConfig
from lockstep.model.weights.names import logical_tensors

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(bfloat16),
    "float16": np.dtype(np.float16),
}
"""What weights can be converted to."""

_FP32 = DTYPES["float32"]


class BadValue(ValueError):
    """A value that float16 cannot hold."""


class Recast:
    """A `Source` whose weights are cast to a dtype; optimizer state stays fp32.

    A model in fp32 needs no fp32 masters: its weights are the source's masters, where it has them. A model that
    becomes less than fp32 and has an optimizer's state keeps its fp32 weights as masters.
    """

    def __init__(self, source: Source, model: ModelConfig, dtype: str | None, *, states: bool = True) -> None:
        """
        Args:
            dtype: one of `DTYPES`, or None to leave all as it is.
            states: whether the optimizer's state comes along.
        """
        self._source, self._shapes = source, logical_tensors(model)
        self._wanted = None if dtype is None else DTYPES[dtype]
        stored = dict.fromkeys(source.states)
        self._masters = {name for name in self._shapes if state_name("master", name) in stored}
        self._moments = [name for name in stored if not name.startswith("master/")]
        self._with_states = states and bool(stored)
        self._found: dict[str, np.dtype[Any]] = {}

    @property
    def states(self) -> Sequence[str]:
        """See `Source`."""
        if not self._with_states:
            return ()
        masters = [state_name("master", name) for name in self._shapes if self._has_master(name)]
        return (*masters, *self._moments)

    @property
    def updates(self) -> int:
        """See `Source`."""
        return self._source.updates if self._with_states else 0

    @property
    def takes_masters(self) -> bool:
        """Whether the weights are read from the source's fp32 masters."""
        return self._wanted == _FP32 and bool(self._masters)

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of everything that can be read: weights, then optimizer state."""
        weights = {name: (shape, self.dtype_of(name)) for name, shape in self._shapes.items()}
        return weights | {name: (self._shapes[name.split("/", 1)[1]], _FP32) for name in self.states}

    def dtype_of(self, name: str) -> np.dtype[Any]:
        """The dtype that a weight is cast to."""
        return self._wanted or self._stored_dtype(name)

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`.

        Raises:
            BadValue: when float16 cannot hold a value that the source's dtype can.
        """
        kind, _, weight = name.rpartition("/")
        if kind:
            stored = kind != "master" or weight in self._masters
            return self._source.read(name if stored else weight, box)
        exact = self.dtype_of(name) == _FP32 and name in self._masters
        return self._cast(name, self._source.read(state_name("master", name) if exact else name, box))

    def _has_master(self, name: str) -> bool:
        return self.dtype_of(name) != _FP32 and (name in self._masters or self._stored_dtype(name) == _FP32)

    def _stored_dtype(self, name: str) -> np.dtype[Any]:
        if name not in self._found:
            self._found[name] = self._source.read(name, tuple((0, 0) for _ in self._shapes[name])).dtype
        return self._found[name]

    def _cast(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        wanted = self._wanted or array.dtype
        if array.dtype == wanted:
            return array
        cast = to_torch(array).to(getattr(torch, wanted.name))
        if wanted == np.float16 and (to_torch(array).isfinite() & ~cast.isfinite()).any():
            raise BadValue(f"{name} has values that float16 cannot hold: convert to bfloat16 or float32")
        return to_numpy(cast)
