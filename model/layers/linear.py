"""megatron-core's ColumnParallelLinear and RowParallelLinear, with adapters, exact numerics and packed CPU weights."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lockstep.distributed.libraries import TransformerConfig, tensor_parallel
from lockstep.distributed.world.groups import Groups
from lockstep.model.config import Numerics
from lockstep.model.ops.exact.reductions import summed, summed_and_split
from lockstep.model.ops.linear import PackedWeight, biased, has_transposes, packed, project, tiles_of
from lockstep.model.ops.upcast import needs_upcast


class Adapting(Protocol):
    """LoRA adapters as a linear layer sees them; see `lockstep.model.layers.lora`."""

    on: bool

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output for x with the adapters' part added to `out`, the output without."""
        ...

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the adapters merged into it."""
        ...


class Packable:
    """A linear layer whose weight may be packed for inference, or adapted by LoRA for training."""

    weight: nn.Parameter
    adapters: Adapting | None
    tp_group: ProcessGroup
    _numerics: Numerics
    _packed: PackedWeight | None = None

    def pack(self) -> None:
        """Use a packed copy of the current weight for inference."""
        assert self.adapters is None, "rollouts see weights with the adapters in them"
        self._packed = packed(self.weight, self._numerics)

    def unpack(self) -> None:
        """Drop the packed copy."""
        self._packed = None

    @property
    def tiles(self) -> Tensor:
        """See `tiles_of`."""
        return tiles_of(self.weight, self._packed)

    @property
    def _is_own(self) -> bool:
        """Whether this class computes the product, and not megatron-core, whose way with tensor ranks has overlap."""
        if self._numerics == "exact" or (self._packed is not None and not torch.is_grad_enabled()):
            return True
        return needs_upcast(self.weight) or (self.tp_group.size() == 1 and has_transposes(self.weight))

    def _product(self, x: Tensor) -> Tensor:
        if self._numerics == "exact" and self.adapters is not None and self.adapters.on:
            return project(x, self.adapters.merged(self.weight), self._numerics)
        weight = self.weight if self._packed is None or torch.is_grad_enabled() else self._packed
        return project(x, weight, self._numerics)

    def _adapted(self, x: Tensor, out: Tensor) -> Tensor:
        """The output with the adapters' part; in exact numerics, which rollouts share, the weight has it."""
        if self.adapters is None or not self.adapters.on or self._numerics == "exact":
            return out
        return self.adapters(x, out)


class ColumnLinear(Packable, tensor_parallel.ColumnParallelLinear):
    """Column-parallel linear layer, […, inputs] → […, outputs / tensor]: this rank holds rows of weight and bias."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: TransformerConfig,
        *,
        bias: bool = False,
        numerics: Numerics = "fast",
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=not_drawn,
            bias=bias,
            gather_output=False,
            skip_bias_add=True,  # where the weight learns nothing, megatron-core would give its bias no gradient
        )
        self._numerics, self.adapters = numerics, None
        mark(self.weight, 0)
        if bias:
            mark(self.bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with bias and adapters; see the class for shapes."""
        if not self._is_own:
            out, bias = super().forward(x)
            return self._adapted(x, biased(out, bias))
        if self.sequence_parallel:
            whole = tensor_parallel.gather_from_sequence_parallel_region(x, group=self.tp_group)
        else:
            whole = tensor_parallel.copy_to_tensor_model_parallel_region(x, self.tp_group)
        return self._adapted(x, biased(self._product(whole), self.bias))


class RowLinear(Packable, tensor_parallel.RowParallelLinear):
    """Row-parallel linear layer, […, inputs / tensor] → […, outputs]: this rank holds columns of the weight."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: TransformerConfig,
        *,
        bias: bool = False,
        numerics: Numerics = "fast",
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=not_drawn,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
        )
        self._numerics, self.adapters = numerics, None
        mark(self.weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with bias and adapters; see the class for shapes."""
        if not self._is_own:
            out, bias = super().forward(x)
        else:
            out, bias = reduced(self._product(x), self.tp_group, self.sequence_parallel, self._numerics), self.bias
        if bias is not None:
            out = out + summed_over(bias, self.tp_group if self.sequence_parallel else None)
        return self._adapted(x, out)


def reduced(part_T: Tensor, group: ProcessGroup, sequence: bool, numerics: Numerics) -> Tensor:
    """All-reduce over tensor ranks, [T, …]; with sequence parallelism reduce-scatter over tokens, [T / ranks, …]."""
    if numerics == "exact":
        return summed_and_split(part_T, group) if sequence else summed(part_T, group)
    if sequence:
        return tensor_parallel.reduce_scatter_to_sequence_parallel_region(part_T, group=group)
    return tensor_parallel.reduce_from_tensor_model_parallel_region(part_T, group=group)


def not_drawn(weight: Tensor) -> Tensor:
    """An `init_method` that does nothing: weights are loaded afterwards, through the slice map."""
    return weight


def mark(weight: nn.Parameter, dim: int) -> None:
    """Mark a weight as tensor-parallel along `dim`, so that gradient norms count every part.

    megatron-core marks weights only where it also draws them, and newer versions always.
    """
    if not hasattr(weight, "tensor_model_parallel"):
        tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dim, 1)
    assert vars(weight)["tensor_model_parallel"]


def sequence_group(groups: Groups) -> ProcessGroup | None:
    """The tensor group under sequence parallelism, where its ranks split activations; None otherwise."""
    return groups.tensor if groups.layout.sequence else None


def summed_over(weight: Tensor, parts: ProcessGroup | None) -> Tensor:
    """The weight itself, with its gradient all-reduced over ranks that each apply it to a part of the tokens or heads.

    In the graph, and not after the backward pass, because ZeRO may have reduced and freed the gradient by then.
    """
    return weight if parts is None else tensor_parallel.copy_to_tensor_model_parallel_region(weight, parts)
