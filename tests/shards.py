"""Whole tensors from shards, in the plainest way."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.tensors import Box, WeightsOnly
from lockstep.rl.weight_sync.protocol import Shard


class Assembled(WeightsOnly):
    """A `Source` over shards that came from any layout."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._tensors: dict[str, NDArray[Any]] = {}
        for name in {s.name for s in shards}:
            parts = [s for s in shards if s.name == name]
            shape = [max(stop for _, stop in places) for places in zip(*(s.box for s in parts), strict=True)]
            self._tensors[name] = np.empty(shape, parts[0].array.dtype)
            for part in parts:
                self._tensors[name][tuple(slice(*places) for places in part.box)] = part.array

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        return self._tensors[name][tuple(slice(*places) for places in box)]
