"""megatron-core's parallel linear layers, whose weights may be reordered once for inference on a CPU."""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lockstep.distributed.groups import Groups


class PackedWeight:
    """A copy of a weight in the blocked layout that oneDNN's kernels read; products of few rows take half the time."""

    def __init__(self, weight: Tensor) -> None:
        """
        Args:
            weight: [outputs, inputs] on a CPU; later changes to it are not seen.
        """
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def __call__(self, x: Tensor) -> Tensor:
        """x · weightᵀ."""
        return torch.ops.mkldnn._linear_pointwise(x, self._blocks, None, "none", [], "")


def packed(weight: Tensor) -> PackedWeight | None:
    """The weight packed, where this machine and this torch can: in bf16 only, since fp32 is there to be exact.

    The blocked kernels add up fp32 products in one chain, which doubles their rounding error over a deep model.
    """
    usable = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    usable = usable and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return PackedWeight(weight) if usable and torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


def linear(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """x · weightᵀ, packed or not."""
    return weight(x) if isinstance(weight, PackedWeight) else F.linear(x, weight)


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias, where there is one."""
    return x if bias is None else x + bias


class Packable:
    """A layer whose weight may be packed for inference."""

    weight: nn.Parameter
    _packed: PackedWeight | None = None

    def pack(self) -> None:
        """Serve inference from a packed copy of the weight as it is now."""
        self._packed = packed(self.weight)


class ColumnLinear(Packable, tensor_parallel.ColumnParallelLinear):
    """[…, inputs] → […, outputs / tensor]: this rank's rows of the weight and of the bias."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, config=config, init_method=not_drawn, bias=bias, gather_output=False)
        mark(self.weight, 0)
        if bias:
            mark(self.bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self._packed is None or torch.is_grad_enabled():
            return super().forward(x)[0]
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        return biased(self._packed(x), self.bias)


class RowLinear(Packable, tensor_parallel.RowParallelLinear):
    """[…, inputs / tensor] → […, outputs]: this rank's columns of the weight, the sum over tensor ranks, the bias."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, *, bias: bool = False) -> None:
        super().__init__(
            inputs,
            outputs,
            config=config,
            init_method=not_drawn,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
        )
        mark(self.weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self._packed is None or torch.is_grad_enabled():
            out, bias = super().forward(x)
            parts = self.tp_group if self.sequence_parallel else None
            return out if bias is None else out + summed_over(bias, parts)
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        return biased(reduce(self._packed(x), group=self.tp_group), self.bias)


def not_drawn(weight: Tensor) -> Tensor:
    """Leaves a weight as it is: it is filled afterwards, through the slice map."""
    return weight


def mark(weight: nn.Parameter, dim: int) -> None:
    """Mark a weight as split along `dim`, so that gradient norms count every part.

    megatron-core marks weights only where it also draws them, and newer versions always.
    """
    if not hasattr(weight, "tensor_model_parallel"):
        tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dim, 1)
    assert vars(weight)["tensor_model_parallel"]


def sequence_group(groups: Groups) -> ProcessGroup | None:
    """The tensor group, where its ranks split activations between matrices; None otherwise."""
    return groups.tensor if groups.layout.sequence else None


def summed_over(weight: Tensor, parts: ProcessGroup | None) -> Tensor:
    """The weight; its gradient is summed over ranks that each apply it to a part of the work.

    In the graph, and not after the backward pass, because ZeRO may have reduced and freed the gradient by then.
    """
    return weight if parts is None else copy_to_tensor_model_parallel_region(weight, parts)
