"""A decoder-only transformer of megatron-core's parallel layers, or one pipeline stage of it.

Tokens stand on the first dim, [T, 1, width] between blocks, as megatron-core's schedules want them: T packed tokens and
a batch of one.
"""

from collections.abc import Sequence

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lockstep.distributed.groups import Groups
from lockstep.distributed.layout import check_divides, stage_layers
from lockstep.model.attention import Attend
from lockstep.model.block import Block, Norm
from lockstep.model.config import ModelConfig
from lockstep.model.linear import ColumnLinear, PackedWeight, RowLinear, mark, not_drawn, packed


def padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """The vocabulary with rows of padding, so that it divides by the tensor degree."""
    return -(-vocabulary // tensor) * tensor


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
        self._ropes = {rope for i in self.layers if (rope := model.rope_of(i))}
        rows = padded_vocabulary(model.vocabulary, groups.layout.tensor)
        self.has_embedding = groups.is_first_stage or (model.tied and groups.is_last_stage)
        if self.has_embedding:
            self.embedding = tensor_parallel.VocabParallelEmbedding(
                rows, model.width, init_method=not_drawn, config=config
            )
            mark(self.embedding.weight, 0)
        if groups.is_first_stage and model.rope is None:
            self.positions = nn.Embedding(model.context, model.width, dtype=config.params_dtype)
        self.blocks = nn.ModuleDict({str(i): Block(model, groups, config, i) for i in self.layers})
        if groups.is_last_stage:
            self.norm = Norm(model, model.width, config.params_dtype)
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

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, received: Tensor | None = None) -> Tensor:
        """Activations [T, 1, width] after this stage's blocks; normed by the last stage, ready for `head_weight`.

        Args:
            received: activations of the stage before; the first stage embeds the tokens instead.
        """
        x = received
        if self.groups.is_first_stage:
            x = self._embedded(tokens_T, positions_T)
        assert x is not None
        tables = {rope: rope.table(positions_T, self.model.head_dim, x.dtype) for rope in self._ropes}
        for index, block in self.blocks.items():
            x = block(x, tables, attend, int(index))
        return self.norm(x) if self.groups.is_last_stage else x

    def _embedded(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        x = self.embedding(tokens_T[:, None])
        if self.model.embedding_scale != 1:  # rounded to the compute dtype first, as the models were trained
            x = x * torch.tensor(self.model.embedding_scale, dtype=x.dtype)
        return x if self.model.rope else x + self.positions(positions_T)[:, None]

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
