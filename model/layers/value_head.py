"""The value head of critics and reward models: one number per token instead of logits.

A critic's value of a state is the number at the token before the next one; a reward model's score of an answer is the
number at its last token. Both are read at a row's predictors: for the score of an answer, a sample's completion is the
answer and one more token, which is never read, and only that one has weight. Such a model has no vocabulary head.
"""

import torch
from torch import Tensor, nn

from lockstep.model.config import Numerics
from lockstep.model.ops.exact import reductions


class ValueHead(nn.Module):
    """Linear layer with one output, [K, width] → [K] in fp32; replicated on every tensor rank."""

    def __init__(self, width: int, dtype: torch.dtype, numerics: Numerics) -> None:
        super().__init__()
        self._numerics = numerics
        self.weight = nn.Parameter(torch.empty(1, width, dtype=dtype))

    def forward(self, hidden_KD: Tensor) -> Tensor:
        """The values, in fp32: they are unbounded, and bf16 has too few digits for them."""
        hidden_KD, weight_D = hidden_KD.float(), self.weight[0].float()
        return hidden_KD @ weight_D if self._numerics == "fast" else reductions.row_sum(hidden_KD * weight_D)
