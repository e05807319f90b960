"""One block of a transformer: attention, then a feed-forward layer, each between norms.

The same block serves training, which passes documents, and rollouts, which pass a KV cache.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lockstep.distributed.groups import Groups
from lockstep.model.attention import Attend
from lockstep.model.config import ModelConfig
from lockstep.model.functions import rms_norm, rotary, swiglu
from lockstep.model.linear import ColumnLinear, RowLinear


class Norm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width, dtype=dtype)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; its heads are split over the tensor axis."""

    def __init__(self, model: ModelConfig, groups: Groups, config: TransformerConfig) -> None:
        super().__init__()
        tensor = groups.layout.tensor
        self.heads, self.kv_heads, self.head_dim = model.heads // tensor, model.kv_heads // tensor, model.head_dim
        self.qkv = ColumnLinear(model.width, (model.heads + 2 * model.kv_heads) * model.head_dim, config)
        self.out = RowLinear(model.heads * model.head_dim, model.width, config)

    def forward(self, x_T1D: Tensor, table: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        heads_THE = self.qkv(x_T1D).view(x_T1D.shape[0], -1, self.head_dim)
        turned, v = heads_THE.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = rotary(turned, table).split([self.heads, self.kv_heads], dim=1)
        return self.out(attend(layer, q, k, v).reshape(x_T1D.shape[0], 1, -1))


class MLP(nn.Module):
    """Gated feed-forward layer; its intermediate width is split over the tensor axis."""

    def __init__(self, model: ModelConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = ColumnLinear(model.width, 2 * model.intermediate, config)
        self.down = RowLinear(model.intermediate, model.width, config)

    def forward(self, x_T1D: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x_T1D)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, model: ModelConfig, groups: Groups, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(model.width, model.norm_eps, config.params_dtype)
        self.attention = Attention(model, groups, config)
        self.mlp_norm = Norm(model.width, model.norm_eps, config.params_dtype)
        self.mlp = MLP(model, config)

    def forward(self, x_T1D: Tensor, table: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        x_T1D = x_T1D + self.attention(self.attention_norm(x_T1D), table, attend, layer)
        return x_T1D + self.mlp(self.mlp_norm(x_T1D))
