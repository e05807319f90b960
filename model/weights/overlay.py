"""A Source with tensors added: value heads, new adapters."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.tensors import Box, Source
from lockstep.model.config import Head, ModelConfig
from lockstep.model.weights.names import VALUE


class NewTensors:
    """A `Source` that has some tensors more than another; it has no state for them, and nothing that it replaces."""

    def __init__(self, source: Source, new: dict[str, NDArray[Any]]) -> None:
        """
        Args:
            new: by name, what the source's own tensors of these names are preferred to.
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
    """A model with this head, and its source with one.

    A value head that the source lacks is 0: a critic begins by expecting nothing, and a reward model by telling
    nothing apart, with a loss of ln 2.
    """
    wanted = model.with_head(head)
    if wanted == model:
        return model, source
    return wanted, NewTensors(source, {VALUE: np.zeros((1, model.width), np.float32)})
