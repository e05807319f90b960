"""Random initial weights for training from scratch, as a `Source`."""

import numpy as np

from lockstep.distributed.checkpoint.tensors import Box, WeightsOnly
from lockstep.model.config import ModelConfig
from lockstep.model.weights.names import logical_tensors


class RandomWeights(WeightsOnly):
    """Random weights: each logical tensor is drawn from (seed, its name), so they are the same in any layout."""

    def __init__(self, model: ModelConfig, seed: int, deviation: float = 0.02) -> None:
        self._shapes, self._seed, self._deviation = logical_tensors(model), seed, deviation
        self._scale = 0 if model.norm == "rms_offset" else 1

    def read(self, name: str, box: Box) -> np.ndarray:
        """See `Source`. Matrices are normal with the given standard deviation, norms scale by 1, biases are 0."""
        shape = self._shapes[name]
        if len(shape) == 1:
            value = 0 if name.endswith(".bias") else self._scale
            return np.full([b - a for a, b in box], value, np.float32)
        generator = np.random.default_rng([self._seed, *name.encode()])
        drawn = generator.standard_normal(shape, dtype=np.float32) * np.float32(self._deviation)
        return drawn[tuple(slice(a, b) for a, b in box)]
