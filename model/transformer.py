"""A decoder-only transformer of megatron-core's parallel layers, or one pipeline stage of it.

Tokens stand on the first dim, [T, 1, width] between blocks, as megatron-core's schedules want them: T packed tokens and
a batch of one. The same block serves training, which passes documents, and rollouts, which pass a KV cache.
"""

from collections.abc import Sequence

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lockstep.distributed.groups import Groups
from lockstep.distributed.layout import check_divides, stage_layers
from lockstep.model.attention import Attend
from lockstep.model.config import ModelConfig
from lockstep.model.functions import rms_norm, rotary, rotary_table, swiglu


def padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """The vocabulary with rows of padding, so that it divides by the tensor degree."""
    return -(-vocabulary // tensor) * tensor


def _not_drawn(weight: Tensor) -> Tensor:
    """Weights are filled afterwards, through the slice map."""
    return weight


def _marked(layer: nn.Module, dim: int) -> nn.Module:
    """The layer with its weight marked as split along `dim`, so that gradient norms count every part.

    megatron-core marks weights only where it also draws them, and newer versions always.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if not hasattr(weight, "tensor_model_parallel"):
        tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dim, 1)
    assert vars(weight)["tensor_model_parallel"]
    return layer


def _column(inputs: int, outputs: int, config: TransformerConfig) -> nn.Module:
    layer = tensor_parallel.ColumnParallelLinear(
        inputs, outputs, config=config, init_method=_not_drawn, bias=False, gather_output=False
    )
    return _marked(layer, 0)


def _row(inputs: int, outputs: int, config: TransformerConfig) -> nn.Module:
    layer = tensor_parallel.RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=_not_drawn,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    return _marked(layer, 1)


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
        self.qkv = _column(model.width, (model.heads + 2 * model.kv_heads) * model.head_dim, config)
        self.out = _row(model.heads * model.head_dim, model.width, config)

    def forward(self, x_T1D: Tensor, table: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        heads_THE = self.qkv(x_T1D)[0].view(x_T1D.shape[0], -1, self.head_dim)
        turned, v = heads_THE.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = rotary(turned, table).split([self.heads, self.kv_heads], dim=1)
        return self.out(attend(layer, q, k, v).reshape(x_T1D.shape[0], 1, -1))[0]


class MLP(nn.Module):
    """Gated feed-forward layer; its intermediate width is split over the tensor axis."""

    def __init__(self, model: ModelConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = _column(model.width, 2 * model.intermediate, config)
        self.down = _row(model.intermediate, model.width, config)

    def forward(self, x_T1D: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x_T1D)[0]))[0]


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
        self.layers: Sequence[int] = stage_layers(model.layers, groups.layout.pipeline)[groups.stage]
        rows = padded_vocabulary(model.vocabulary, groups.layout.tensor)
        self.has_embedding = groups.is_first_stage or (model.tied and groups.is_last_stage)
        if self.has_embedding:
            embedding = tensor_parallel.VocabParallelEmbedding(rows, model.width, init_method=_not_drawn, config=config)
            self.embedding = _marked(embedding, 0)
        self.blocks = nn.ModuleDict({str(i): Block(model, groups, config) for i in self.layers})
        if groups.is_last_stage:
            self.norm = Norm(model.width, model.norm_eps, config.params_dtype)
            if not model.tied:
                self.head = _column(model.width, rows, config)

    @property
    def tied_over_stages(self) -> nn.Parameter | None:
        """The embedding, where first and last stage each hold a copy that must stay equal."""
        weight = self.embedding.weight if self.model.tied and self.has_embedding else None
        assert weight is None or isinstance(weight, nn.Parameter)
        return weight

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, received: Tensor | None = None) -> Tensor:
        """Activations [T, 1, width] after this stage's blocks; normed by the last stage, ready for `head_weight`.

        Args:
            received: activations of the stage before; the first stage embeds the tokens instead.
        """
        x = received
        if self.groups.is_first_stage:
            x = self.embedding(tokens_T[:, None])
        assert x is not None
        table = rotary_table(positions_T, self.model.head_dim, self.model.rope_theta, x.dtype)
        for index, block in self.blocks.items():
            x = block(x, table, attend, int(index))
        return self.norm(x) if self.groups.is_last_stage else x

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows [V/tensor, width] of the output projection, padding included. Last stage only."""
        weight = self.embedding.weight if self.model.tied else self.head.weight
        assert isinstance(weight, Tensor)
        return weight
