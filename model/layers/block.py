"""A transformer block: attention, then a feed-forward layer or experts, with norms before, after or around each.

Everything in which model families differ is a value of `ModelConfig`; the same block serves training, which passes
documents, and rollouts, which pass a KV cache.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from lockstep.distributed.libraries import TransformerConfig
from lockstep.distributed.world.groups import Groups
from lockstep.model.attention.spec import Attend, AttentionSpec, call_attend
from lockstep.model.config import ModelConfig, Numerics
from lockstep.model.layers.linear import ColumnLinear, RowLinear, sequence_group
from lockstep.model.layers.mlp import MLP, GatedMLP
from lockstep.model.layers.moe import MoE, Sequences
from lockstep.model.layers.norm import QK_NORMS, Norm
from lockstep.model.layers.routing import Route
from lockstep.model.ops.fused import rotary
from lockstep.model.rope import Rope

Tables = Mapping[Rope, tuple[Tensor, Tensor]]
"""Cosines and sines of the tokens' positions, for each `Rope` of a model."""


class Attention(nn.Module):
    """Grouped-query attention with tensor parallelism over heads."""

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
        self.spec = AttentionSpec(scale, model.attention_cap, model.window_of(layer))
        self._call_attend: Callable[..., Tensor] = call_attend

    def compile_around(self, call: Callable[..., Tensor]) -> None:
        """Call attention through `call`, which `torch.compile` does not trace, instead of `call_attend`."""
        self._call_attend = call

    def forward(self, x_T1D: Tensor, tables: Tables, attend: Attend, layer: int) -> Tensor:
        """[T, 1, width] → [T, 1, width]; tokens are split over tensor ranks with sequence parallelism."""
        heads_THE = self.qkv(x_T1D).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        qk, v = heads_THE.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        qk = self.qk_norm(qk)
        if self.rope is not None:
            qk = rotary(qk, tables[self.rope])
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        return self.out(self._call_attend(attend, layer, q, k, v, self.spec).flatten(1)[:, None])


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
        self,
        x_T1D: Tensor,
        tables: Tables,
        attend: Attend,
        layer: int,
        sequences: Sequences | None = None,
        route: Route | None = None,
    ) -> Tensor:
        """[T, 1, width] → [T, 1, width]; `sequences` are for the router's losses, `route` for its choice."""
        x_T1D = x_T1D + self.attention_after(self.attention(self.attention_norm(x_T1D), tables, attend, layer))
        normed = self.mlp_norm(x_T1D)
        out = (
            self.mlp(normed, sequences, None if route is None else partial(route, layer))
            if isinstance(self.mlp, MoE)
            else self.mlp(normed)
        )
        return x_T1D + self.mlp_after(out)
