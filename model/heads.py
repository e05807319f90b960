"""A value head: one number for each token, in the place of a logit for each token of the vocabulary.

A critic's value of a state is the number at the token before the next one; a reward model's score of an answer is the
number at its last token. Both are the numbers at a row's predictors: for the score of an answer, a sample's completion
is the answer and one more token, which is not read, and only that one weighs something. A model of this kind does not
hold a vocabulary's head.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lockstep.distributed.checkpoint.tensors import Box, Source
from lockstep.model import exact
from lockstep.model.config import Head, ModelConfig, Numerics
from lockstep.model.names import VALUE


class ValueHead(nn.Module):
    """[K, width] → [K] in fp32. Every tensor rank holds and computes the whole of it: it is one row."""

    def __init__(self, width: int, dtype: torch.dtype, numerics: Numerics) -> None:
        super().__init__()
        self._numerics = numerics
        self.weight = nn.Parameter(torch.empty(1, width, dtype=dtype))

    def forward(self, hidden_KD: Tensor) -> Tensor:
        """Values are not bounded, and bf16 has too few digits for what stands at their end: they are fp32."""
        hidden_KD, weight_D = hidden_KD.float(), self.weight[0].float()
        return hidden_KD @ weight_D if self._numerics == "fast" else exact.row_sum(hidden_KD * weight_D)


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
