"""Adds new tensors, such as a value head or adapters, to a `Source`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.tensors import Box, Source
from lockstep.model.config import Head, ModelConfig
from lockstep.model.weights.names import VALUE


class NewTensors:
    """A `Source` with additional tensors, used where the wrapped source lacks them. They have no optimizer state."""

    def __init__(self, source: Source, new: dict[str, NDArray[Any]]) -> None:
        """
        Args:
            new: the additional tensors by name; the source's own tensors of the same names take precedence.
        """
        self._source, self._new = source, new
        self.states, self.updates = source.states, source.updates

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        try:
            return self._source.read(name, box)
        except KeyError:
            if name not in self._new:
                raise
            return self._new[name][tuple(slice(a, b) for a, b in box)]


def with_head(model: ModelConfig, source: Source, head: Head) -> tuple[ModelConfig, Source]:
    """Give a model this kind of head; a value head that the source lacks is initialised to 0.

    So a critic's first values are 0, and a reward model starts with equal scores and a loss of ln 2.
    """
    wanted = model.with_head(head)
    if wanted == model:
        return model, source
    return wanted, NewTensors(source, {VALUE: np.zeros((1, model.width), np.float32)})
