"""A value head: one number for each token, in the place of a logit for each token of the vocabulary.

A critic's value of a state is the number at the token before the next one; a reward model's score of an answer is the
number at its last token. Both are the numbers at a row's predictors: for the score of an answer, a sample's completion
is the answer and one more token, which is not read, and only that one weighs something. A model of this kind does not
hold a vocabulary's head.
"""

import torch
from torch import Tensor, nn

from lockstep.model.config import Numerics
from lockstep.model.ops.exact import reductions


class ValueHead(nn.Module):
    """[K, width] → [K] in fp32. Every tensor rank holds and computes the whole of it: it is one row."""

    def __init__(self, width: int, dtype: torch.dtype, numerics: Numerics) -> None:
        super().__init__()
        self._numerics = numerics
        self.weight = nn.Parameter(torch.empty(1, width, dtype=dtype))

    def forward(self, hidden_KD: Tensor) -> Tensor:
        """Values are not bounded, and bf16 has too few digits for what stands at their end: they are fp32."""
        hidden_KD, weight_D = hidden_KD.float(), self.weight[0].float()
        return hidden_KD @ weight_D if self._numerics == "fast" else reductions.row_sum(hidden_KD * weight_D)
