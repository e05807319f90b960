"""Matrix products of bf16 tensors by fp32 products, on CPUs for which torch has no bf16 kernels.

Without AVX-512 or AVX-NE-CONVERT torch multiplies bf16 matrices by plain loops, up to a hundred times slower than fp32.
Each product of two bf16 numbers is exact in fp32, so that results are as good as those of bf16 kernels.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def needs_upcast(x: Tensor) -> bool:
    """Whether products with x are computed in fp32: in bf16 on a CPU without bf16 kernels."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not has_bf16_kernels()


@cache
def has_bf16_kernels() -> bool:
    """Whether torch has oneDNN, and oneDNN has kernels for bf16 on this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiply(operation: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """operation(*operands), which is a product such as `torch.mm`, in fp32 where the first operand `needs_upcast`.

    The result has the first operand's dtype. Operands that are in fp32 already are taken as they are.
    """
    if not needs_upcast(operands[0]):
        return operation(*operands)
    return operation(*(x.float() for x in operands)).to(operands[0].dtype)
