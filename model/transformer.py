"""A decoder-only transformer of megatron-core's parallel layers, or one pipeline stage of it.

Activations between blocks are [T, 1, width], as megatron-core's schedules want them: T packed tokens, a batch of one.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.distributed.layout import ranges, stage_layers
from lockstep.distributed.libraries import TransformerConfig, tensor_parallel
from lockstep.distributed.world.groups import Groups
from lockstep.model.attention.spec import Attend, call_attend
from lockstep.model.config import ModelConfig, Numerics, check_layout, check_numerics
from lockstep.model.layers.block import Block
from lockstep.model.layers.linear import ColumnLinear, RowLinear, mark, not_drawn, sequence_group
from lockstep.model.layers.lora import add_adapters, without_adapters
from lockstep.model.layers.moe import Sequences
from lockstep.model.layers.norm import Norm
from lockstep.model.layers.recompute import Recompute, Recomputed, recomputed
from lockstep.model.layers.routing import Route
from lockstep.model.layers.value_head import ValueHead
from lockstep.model.ops.linear import PackedWeight, packed, tiles_of
from lockstep.model.weights.sharding import padded_vocabulary


def _layers(model: ModelConfig, groups: Groups) -> list[range]:
    """Layers of each of this rank's virtual stages."""
    layout = groups.layout
    outside = (model.vocabulary + model.head_rows) * model.width
    row = model.width * model.layers / (model.parameters - outside)
    head = model.vocabulary if model.head == "vocabulary" else 1
    first, last = min(1.0, model.vocabulary * row), head * row
    balanced = stage_layers(model.layers, layout.chunks, first=first, last=last)
    return (ranges(layout.stages) if layout.stages else balanced)[groups.stage :: layout.pipeline]


class Transformer(nn.Module):
    """A decoder-only transformer, or this rank's pipeline stage of one."""

    def __init__(
        self, model: ModelConfig, groups: Groups, config: TransformerConfig, numerics: Numerics = "fast"
    ) -> None:
        """
        Raises:
            LayoutError: when the layout does not divide heads, widths or layers, or has no exact numerics.
        """
        super().__init__()
        check_layout(groups.layout, model)
        check_numerics(numerics, groups.layout, model)
        self.model, self.groups, self.numerics = model, groups, numerics
        self.layers = _layers(model, groups)
        held = [i for part in self.layers for i in part]
        self.ropes = {rope for i in held if (rope := model.rope_of(i))}
        rows = padded_vocabulary(model.vocabulary, groups.layout.tensor)
        self.has_embedding = groups.is_first_stage or (model.tied and groups.is_last_stage)
        if self.has_embedding:
            self.embedding = tensor_parallel.VocabParallelEmbedding(
                rows, model.width, init_method=not_drawn, config=config
            )
            mark(self.embedding.weight, 0)
        if groups.is_first_stage and model.rope is None:
            self.positions = nn.Embedding(model.context, model.width, dtype=config.params_dtype)
        self.blocks = nn.ModuleDict({str(i): Block(model, groups, config, i, numerics) for i in held})
        add_adapters(self.blocks, model, groups, config.params_dtype)
        if groups.is_last_stage:
            self.norm = Norm(model, model.width, config.params_dtype, sequence_group(groups), numerics)
            if model.head == "value":
                self.head: ValueHead | ColumnLinear = ValueHead(model.width, config.params_dtype, numerics)
            elif not model.tied:
                self.head = ColumnLinear(model.width, rows, config, numerics=numerics)
        self._packed_head: PackedWeight | None = None
        self.recompute: Recompute = "none"
        self._adapted = True

    def without_adapters(self) -> "Transformer":
        """The same model, sharing its weights, that computes without its adapters."""
        base = copy.copy(self)
        base._adapted = False
        return base

    def pack(self) -> None:
        """Pack the current weights for CPU inference; call it again whenever they have changed."""
        for module in self.modules():
            if isinstance(module, ColumnLinear | RowLinear):
                module.pack()
        if self.groups.is_last_stage and self.model.head == "vocabulary":
            self._packed_head = packed(self.head_weight, self.numerics)

    def unpack(self) -> None:
        """Drop the packed weights."""
        for module in self.modules():
            if isinstance(module, ColumnLinear | RowLinear):
                module.unpack()
        self._packed_head = None

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile each block with `torch.compile`, for rows of any length; attention itself stays uncompiled.

        Attention loops over documents, which differ in every row: a traced loop would be compiled for each.
        """
        untraced = torch.compiler.disable(call_attend)  # as a decorator it would load the compiler in every process
        for block in self.blocks.values():
            assert isinstance(block, Block)
            block.attention.compile_around(untraced)
            block.compile(backend=backend, dynamic=True)

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
        sequences: Sequences | None = None,
        route: Route | None = None,
    ) -> Tensor:
        """Activations [T, 1, width] after the blocks of a stage; normed by the last stage, ready for `head_weight`.

        Args:
            received: activations of the stage before; the first stage embeds the tokens instead.
            chunk: which of this rank's virtual stages to run.
            finish: applied to the last stage's activations; inside, because ZeRO-3 gathers weights during a forward.
            sequences: documents of the row, for the routers' losses; None for no such losses.
            route: decides which experts tokens go to; None for those that the routers choose.
        """
        with nullcontext() if self._adapted else without_adapters(self):
            return self._computed(tokens_T, positions_T, attend, received, chunk, finish, sequences, route)

    def _computed(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        received: Tensor | None,
        chunk: int,
        finish: Callable[[Tensor], Tensor] | None,
        sequences: Sequences | None,
        route: Route | None,
    ) -> Tensor:
        x = received
        if self.groups.is_first_stage and chunk == 0:
            x = self._embedded(tokens_T, positions_T)
            if torch.is_grad_enabled() and self.groups.layout.pipeline > 1:
                x.requires_grad_()  # schedules start a backward from what a stage sends on, even if nothing here learns
        assert x is not None
        tables = {rope: rope.table(positions_T, self.model.head_dim, x.dtype) for rope in self.ropes}
        again = self.recompute if torch.is_grad_enabled() else "none"
        if again == "selective":
            attend = Recomputed(attend)
        for index in self.layers[chunk]:
            arguments = self.blocks[str(index)], x, tables, attend, index, sequences, route
            x = recomputed(*arguments) if again == "full" else arguments[0](*arguments[1:])
        if not (self.groups.is_last_stage and chunk == len(self.layers) - 1):
            return x
        x = self.norm(x)
        if self.groups.layout.sequence:
            x = tensor_parallel.gather_from_sequence_parallel_region(
                x, tensor_parallel_output_grad=False, group=self.groups.tensor
            )
        return finish(x) if finish else x

    def _embedded(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        x = self.embedding(tokens_T[:, None])
        if self.model.embedding_scale != 1:  # rounded to the compute dtype first, as the models were trained
            x = x * torch.tensor(self.model.embedding_scale, dtype=x.dtype)
        if self.model.rope is None:
            x = x + self.positions(positions_T)[:, None]
        return (
            tensor_parallel.scatter_to_sequence_parallel_region(x, self.groups.tensor)
            if self.groups.layout.sequence
            else x
        )

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows [V/tensor, width] of the output projection, padding included. Last stage only.

        A value head's weight is [1, width].
        """
        weight = self.embedding.weight if self.model.tied else self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def inference_head(self) -> Tensor | PackedWeight:
        """`head_weight`, packed if it has been."""
        return self.head_weight if self._packed_head is None else self._packed_head

    @property
    def head_tiles(self) -> Tensor:
        """`head_weight` as `CpuDecoder` reads it; see `tiles_of`."""
        return tiles_of(self.head_weight, self._packed_head)
