"""One block of a transformer: attention, then a feed-forward layer, with norms before, after or around each.

Everything in which model families differ is a value of `ModelConfig`; the same block serves training, which passes
documents, and rollouts, which pass a KV cache.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lockstep.distributed.groups import Groups
from lockstep.model import exact
from lockstep.model.attention import Attend
from lockstep.model.config import ModelConfig, Numerics
from lockstep.model.functions import gated, rms_norm, rotary, swiglu
from lockstep.model.linear import ColumnLinear, RowLinear, mark, reduced, sequence_group, summed_over
from lockstep.model.moe import MoE, Sequences
from lockstep.model.rope import Rope
from lockstep.model.scoring import Scoring

Tables = Mapping[Rope, tuple[Tensor, Tensor]]
"""Cosines and sines of the tokens' positions, for each kind of rotary positions that a model has."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def activation(name: str, numerics: Numerics) -> Callable[[Tensor], Tensor]:
    """The activation of this name."""
    return (ACTIVATIONS if numerics == "fast" else exact.ACTIVATIONS)[name]


class Norm(nn.Module):
    """A norm over the last dim with a learned scale."""

    def __init__(
        self,
        model: ModelConfig,
        width: int,
        dtype: torch.dtype,
        parts: ProcessGroup | None = None,
        numerics: Numerics = "fast",
    ) -> None:
        """
        Args:
            parts: ranks that each norm tokens, or heads, of their own.
        """
        super().__init__()
        self.kind, self.eps, self._parts, self._numerics = model.norm, model.norm_eps, parts, numerics
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, dtype=dtype)) if self.kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = summed_over(self.weight, self._parts)
        if self.kind == "rms":
            return rms_norm(x, weight, self.eps, self._numerics)
        if self.kind == "rms_offset":  # 1 + weight has no place for a small weight in bf16
            return rms_norm(x.float(), 1 + weight.float(), self.eps, self._numerics).to(x.dtype)
        assert self.bias is not None
        return F.layer_norm(x, weight.shape, weight, summed_over(self.bias, self._parts), self.eps)


class HeadNorm(nn.Module):
    """A norm of each head of queries and keys; all heads share one weight, whose gradient all tensor ranks add to."""

    def __init__(self, model: ModelConfig, groups: Groups, dtype: torch.dtype, numerics: Numerics) -> None:
        super().__init__()
        self.queries = model.heads // groups.layout.tensor
        self.q = Norm(model, model.head_dim, dtype, groups.tensor, numerics)
        self.k = Norm(model, model.head_dim, dtype, groups.tensor, numerics)

    def forward(self, qk_THE: Tensor) -> Tensor:
        normed = self.q(qk_THE[:, : self.queries]), self.k(qk_THE[:, self.queries :])
        return torch.cat(normed, dim=1)


class WidthNorm(nn.Module):
    """A root-mean-square norm over all queries, and one over all keys, though tensor ranks hold some heads each."""

    def __init__(self, model: ModelConfig, groups: Groups, dtype: torch.dtype, numerics: Numerics) -> None:
        super().__init__()
        tensor, self._numerics = groups.layout.tensor, numerics
        self.queries, self.group, self.eps = model.heads // tensor, groups.tensor, model.norm_eps
        self.widths = model.heads * model.head_dim, model.kv_heads * model.head_dim
        self.q, self.k = _Scale(self.widths[0] // tensor, dtype), _Scale(self.widths[1] // tensor, dtype)

    def forward(self, qk_THE: Tensor) -> Tensor:
        wide = qk_THE.float()
        parts = wide[:, : self.queries], wide[:, self.queries :]
        squares = (x.square().flatten(1) for x in parts)
        sums_T2 = torch.stack([x.sum(1) if self._numerics == "fast" else exact.row_sum(x) for x in squares], dim=1)
        # Every rank's part of the loss depends on the sum: it is summed forwards, and its gradient backwards.
        sums_T2 = reduced(sums_T2, self.group, False, self._numerics)
        sums_T2 = copy_to_tensor_model_parallel_region(sums_T2, self.group)
        scales = (torch.rsqrt(sums_T2[:, i, None, None] / width + self.eps) for i, width in enumerate(self.widths))
        normed = [
            (x * scale).to(qk_THE.dtype) * norm.weight.view(-1, x.shape[2])
            for x, scale, norm in zip(parts, scales, (self.q, self.k), strict=True)
        ]
        return torch.cat(normed, dim=1)


class _Scale(nn.Module):
    """This rank's part of a norm's weight."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        mark(self.weight, 0)


QK_NORMS: dict[str | None, Callable[[ModelConfig, Groups, torch.dtype, Numerics], nn.Module]] = {
    None: lambda model, groups, dtype, numerics: nn.Identity(),
    "head": HeadNorm,
    "width": WidthNorm,
}


class Attention(nn.Module):
    """Grouped-query attention; its heads are split over the tensor axis."""

    def __init__(
        self, model: ModelConfig, groups: Groups, config: TransformerConfig, layer: int, numerics: Numerics
    ) -> None:
        super().__init__()
        tensor = groups.layout.tensor
        self.heads, self.kv_heads, self.head_dim = model.heads // tensor, model.kv_heads // tensor, model.head_dim
        queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
        self.qkv = ColumnLinear(model.width, queries + 2 * keys, config, bias="qkv" in model.biases, numerics=numerics)
        self.qk_norm = QK_NORMS[model.qk_norm](model, groups, config.params_dtype, numerics)
        self.out = RowLinear(queries, model.width, config, bias="out" in model.biases, numerics=numerics)
        self.rope, self._numerics = model.rope_of(layer), numerics
        scale = None if model.query_scalar is None else model.query_scalar**-0.5
        self.scoring = Scoring(scale, model.attention_cap, model.window_of(layer))

    def forward(self, x_T1D: Tensor, tables: Tables, attend: Attend, layer: int) -> Tensor:
        heads_THE = self.qkv(x_T1D).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        qk, v = heads_THE.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        qk = self.qk_norm(qk)
        if self.rope is not None:
            qk = rotary(qk, tables[self.rope], self._numerics)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        return self.out(attend(layer, q, k, v, self.scoring).flatten(1)[:, None])


class GatedMLP(nn.Module):
    """Gated feed-forward layer; its intermediate width is split over the tensor axis."""

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
        return self.down(self._activation(self.gate_up(x_T1D)))


class MLP(nn.Module):
    """Feed-forward layer; its intermediate width is split over the tensor axis."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, numerics: Numerics) -> None:
        super().__init__()
        bias = "mlp" in model.biases
        self.up = ColumnLinear(model.width, model.intermediate, config, bias=bias, numerics=numerics)
        self.down = RowLinear(model.intermediate, model.width, config, bias=bias, numerics=numerics)
        self._activation = activation(model.activation, numerics)

    def forward(self, x_T1D: Tensor) -> Tensor:
        return self.down(self._activation(self.up(x_T1D)))


class Block(nn.Module):
    """x + after(attention(before(x))), then the same with the feed-forward layer, or with experts in its place."""

    def __init__(
        self, model: ModelConfig, groups: Groups, config: TransformerConfig, layer: int, numerics: Numerics = "fast"
    ) -> None:
        super().__init__()

        def norm(*where: str) -> nn.Module:
            if model.norm_at not in where:
                return nn.Identity()
            return Norm(model, model.width, config.params_dtype, sequence_group(groups), numerics)

        self.attention_norm = norm("before", "around")
        self.attention = Attention(model, groups, config, layer, numerics)
        self.attention_after = norm("after", "around")
        self.mlp_norm = norm("before", "around")
        dense = GatedMLP if model.gated else MLP
        self.mlp = (
            dense(model, config, numerics)
            if model.moe is None
            else MoE(model.moe, model.width, groups, config, numerics)
        )
        self.mlp_after = norm("after", "around")

    def forward(
        self, x_T1D: Tensor, tables: Tables, attend: Attend, layer: int, sequences: Sequences | None = None
    ) -> Tensor:
        x_T1D = x_T1D + self.attention_after(self.attention(self.attention_norm(x_T1D), tables, attend, layer))
        normed = self.mlp_norm(x_T1D)
        out = self.mlp(normed, sequences) if isinstance(self.mlp, MoE) else self.mlp(normed)
        return x_T1D + self.mlp_after(out)
