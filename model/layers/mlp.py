"""Tensor-parallel feed-forward layers, gated (SwiGLU and relatives) or plain, and their activations."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from lockstep.distributed.libraries import TransformerConfig
from lockstep.model.config import ModelConfig, Numerics
from lockstep.model.layers.linear import ColumnLinear, RowLinear
from lockstep.model.ops.exact import reductions
from lockstep.model.ops.fused import gated, swiglu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def activation(name: str, numerics: Numerics) -> Callable[[Tensor], Tensor]:
    """The activation function of this name, batch-invariant in exact numerics."""
    return (ACTIVATIONS if numerics == "fast" else reductions.ACTIVATIONS)[name]


class GatedMLP(nn.Module):
    """Gated feed-forward layer, down(act(gate(x)) · up(x)), tensor-parallel over its intermediate width."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, numerics: Numerics) -> None:
        super().__init__()
        bias = "mlp" in model.biases
        self.gate_up = ColumnLinear(model.width, 2 * model.intermediate, config, bias=bias, numerics=numerics)
        self.down = RowLinear(model.intermediate, model.width, config, bias=bias, numerics=numerics)
        self._activation: Callable[[Tensor], Tensor] = (
            partial(swiglu, numerics=numerics)
            if model.activation == "silu"
            else partial(gated, activation=activation(model.activation, numerics))
        )

    def forward(self, x_T1D: Tensor) -> Tensor:
        """[T, 1, width] → [T, 1, width]."""
        return self.down(self._activation(self.gate_up(x_T1D)))


class MLP(nn.Module):
    """Feed-forward layer, down(act(up(x))), tensor-parallel over its intermediate width."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, numerics: Numerics) -> None:
        super().__init__()
        bias = "mlp" in model.biases
        self.up = ColumnLinear(model.width, model.intermediate, config, bias=bias, numerics=numerics)
        self.down = RowLinear(model.intermediate, model.width, config, bias=bias, numerics=numerics)
        self._activation = activation(model.activation, numerics)

    def forward(self, x_T1D: Tensor) -> Tensor:
        """[T, 1, width] → [T, 1, width]."""
        return self.down(self._activation(self.up(x_T1D)))
