"""A decoder-only transformer of megatron-core's parallel layers, or one pipeline stage of it.

Tokens stand on the first dim, [T, 1, width] between blocks, as megatron-core's schedules want them: T packed tokens and
a batch of one. The same block serves training, which passes documents, and rollouts, which pass a KV cache.
"""

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lockstep.distributed.groups import Groups
from lockstep.distributed.layout import check_divides, ranges, stage_layers
from lockstep.model.attention import Attend
from lockstep.model.config import ModelConfig
from lockstep.model.functions import rms_norm, rotary, rotary_table, swiglu
from lockstep.model.linear import (
    ColumnLinear,
    PackedWeight,
    RowLinear,
    mark,
    not_drawn,
    packed,
    sequence_group,
    summed_over,
)


def padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """The vocabulary with rows of padding, so that it divides by the tensor degree."""
    return -(-vocabulary // tensor) * tensor


class Norm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype, parts: ProcessGroup | None = None) -> None:
        """
        Args:
            parts: the tensor group, where each of its ranks norms tokens of its own.
        """
        super().__init__()
        self.weight, self.eps, self._parts = nn.Parameter(torch.ones(width, dtype=dtype)), eps, parts

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, summed_over(self.weight, self._parts), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; its heads are split over the tensor axis."""

    def __init__(self, model: ModelConfig, groups: Groups, config: TransformerConfig) -> None:
        super().__init__()
        tensor = groups.layout.tensor
        self.heads, self.kv_heads, self.head_dim = model.heads // tensor, model.kv_heads // tensor, model.head_dim
        self.qkv = ColumnLinear(model.width, (model.heads + 2 * model.kv_heads) * model.head_dim, config)
        self.out = RowLinear(model.heads * model.head_dim, model.width, config)

    def forward(self, x_T1D: Tensor, table: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        projected = self.qkv(x_T1D)
        heads_THE = projected.view(projected.shape[0], -1, self.head_dim)
        turned, v = heads_THE.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = rotary(turned, table).split([self.heads, self.kv_heads], dim=1)
        return self.out(attend(layer, q, k, v).reshape(projected.shape[0], 1, -1))


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
        parts = sequence_group(groups)
        self.attention_norm = Norm(model.width, model.norm_eps, config.params_dtype, parts)
        self.attention = Attention(model, groups, config)
        self.mlp_norm = Norm(model.width, model.norm_eps, config.params_dtype, parts)
        self.mlp = MLP(model, config)

    def forward(self, x_T1D: Tensor, table: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        x_T1D = x_T1D + self.attention(self.attention_norm(x_T1D), table, attend, layer)
        return x_T1D + self.mlp(self.mlp_norm(x_T1D))


def _layers(model: ModelConfig, groups: Groups) -> list[range]:
    """Layers of each of this rank's virtual stages."""
    layout = groups.layout
    block = (model.parameters - model.width * (1 + (1 if model.tied else 2) * model.vocabulary)) / model.layers
    head = model.vocabulary * model.width / block
    balanced = stage_layers(model.layers, layout.chunks, first=min(1.0, head), last=head)
    return (ranges(layout.stages) if layout.stages else balanced)[groups.stage :: layout.pipeline]


class Transformer(nn.Module):
    """The layers of one pipeline stage: all of them when there is one stage."""

    def __init__(self, model: ModelConfig, groups: Groups, config: TransformerConfig) -> None:
        """
        Raises:
            LayoutError: when heads, widths or layers do not divide by the layout.
        """
        super().__init__()
        check_divides(
            groups.layout,
            heads=model.heads,
            kv_heads=model.kv_heads,
            intermediate=model.intermediate,
            layers=model.layers,
        )
        self.model, self.groups = model, groups
        self.layers = _layers(model, groups)
        rows = padded_vocabulary(model.vocabulary, groups.layout.tensor)
        self.has_embedding = groups.is_first_stage or (model.tied and groups.is_last_stage)
        if self.has_embedding:
            self.embedding = tensor_parallel.VocabParallelEmbedding(
                rows, model.width, init_method=not_drawn, config=config
            )
            mark(self.embedding.weight, 0)
        self.blocks = nn.ModuleDict({str(i): Block(model, groups, config) for part in self.layers for i in part})
        if groups.is_last_stage:
            self.norm = Norm(model.width, model.norm_eps, config.params_dtype, sequence_group(groups))
            if not model.tied:
                self.head = ColumnLinear(model.width, rows, config)
        self._packed_head: PackedWeight | None = None

    def pack(self) -> None:
        """Reorder the weights as they are now for inference; call it again whenever they have changed."""
        for module in self.modules():
            if isinstance(module, ColumnLinear | RowLinear):
                module.pack()
        if self.groups.is_last_stage:
            self._packed_head = packed(self.head_weight)

    @property
    def tied_over_stages(self) -> nn.Parameter | None:
        """The embedding, where first and last stage each hold a copy that must stay equal."""
        weight = self.embedding.weight if self.model.tied and self.has_embedding else None
        assert weight is None or isinstance(weight, nn.Parameter)
        return weight

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        received: Tensor | None = None,
        *,
        chunk: int = 0,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Activations [T, 1, width] after the blocks of a stage; normed by the last stage, ready for `head_weight`.

        Args:
            received: activations of the stage before; the first stage embeds the tokens instead.
            chunk: which of this rank's virtual stages to run.
            finish: what the last stage makes of its activations; inside, because ZeRO-3 lends weights for a forward.
        """
        x = received
        if self.groups.is_first_stage and chunk == 0:
            x = self.embedding(tokens_T[:, None])
            if self.groups.layout.sequence:
                x = scatter_to_sequence_parallel_region(x, self.groups.tensor)
        assert x is not None
        table = rotary_table(positions_T, self.model.head_dim, self.model.rope_theta, x.dtype)
        for index in self.layers[chunk]:
            x = self.blocks[str(index)](x, table, attend, index)
        if not (self.groups.is_last_stage and chunk == len(self.layers) - 1):
            return x
        x = self.norm(x)
        if self.groups.layout.sequence:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.groups.tensor)
        return finish(x) if finish else x

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows [V/tensor, width] of the output projection, padding included. Last stage only."""
        weight = self.embedding.weight if self.model.tied else self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def inference_head(self) -> Tensor | PackedWeight:
        """`head_weight`, packed if it has been."""
        return self.head_weight if self._packed_head is None else self._packed_head
