"""Linear projections x · Wᵀ: plain, with a weight packed for CPU inference, or batch-invariant."""

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.model.config import Numerics
from lockstep.model.ops.cpu import kernels
from lockstep.model.ops.exact.matmul import product
from lockstep.model.ops.upcast import has_bf16_kernels, multiply, needs_upcast


class PackedWeight:
    """A copy of a CPU weight in the memory layout that products read fastest; few rows then take half the time.

    Fast products of bf16 use oneDNN's layout where oneDNN has kernels for them, all others that of `kernels.product`.
    Later changes of the weight are not seen.
    """

    def __init__(self, weight: Tensor, tiled: bool) -> None:
        """
        Args:
            weight: [outputs, inputs].
            tiled: whether for `kernels.product`, and not for oneDNN.
        """
        self._outputs, self.tiles = weight.shape[0], kernels.in_tiles(weight) if tiled else None
        self._blocks = None if tiled else torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __call__(self, x: Tensor) -> Tensor:
        """x · weightᵀ."""
        if self.tiles is not None:
            return kernels.product(x.flatten(0, -2), self.tiles, self._outputs).view(*x.shape[:-1], -1)
        return torch.ops.mkldnn._linear_pointwise(x, self._blocks, None, "none", [], "")


def tiles_of(weight: Tensor, packed: PackedWeight | None) -> Tensor:
    """The weight as `kernels.in_tiles` packs it: the packed copy where there is one."""
    return kernels.in_tiles(weight) if packed is None or packed.tiles is None else packed.tiles


def packed(weight: Tensor, numerics: Numerics = "fast") -> PackedWeight | None:
    """Pack a weight for CPU inference, or None where this machine or torch cannot.

    oneDNN's blocked kernels serve bf16 alone: they add up fp32 products in one chain, which doubles their rounding
    error over a deep model, and `kernels.product` is faster.
    """
    by_onednn = numerics == "fast" and weight.dtype == torch.bfloat16 and _reorders()
    usable = weight.device.type == "cpu" if by_onednn else kernels.usable(weight.dtype, weight.device)
    return PackedWeight(weight.detach(), tiled=not by_onednn) if usable else None


def _reorders() -> bool:
    """Whether oneDNN has kernels for bf16 here, and torch hands out its packed products."""
    return has_bf16_kernels() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def project(x: Tensor, weight: Tensor | PackedWeight, numerics: Numerics = "fast") -> Tensor:
    """x · weightᵀ, batch-invariant in exact numerics; a packed weight has no gradient."""
    if isinstance(weight, PackedWeight):
        return weight(x)
    if numerics == "exact":
        return product(x, weight)
    return _Linear.apply(x, weight) if needs_upcast(weight) or has_transposes(weight) else F.linear(x, weight)


def has_transposes(weight: Tensor) -> bool:
    """Whether gradients of a weight are products of transposed copies: by bf16 kernels of a CPU, with a C compiler."""
    return weight.dtype == torch.bfloat16 and not needs_upcast(weight) and kernels.usable(weight.dtype, weight.device)


class _Linear(torch.autograd.Function):
    """`F.linear` with a gradient of the weight by `weight_gradient`, and with products that `multiply` chooses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(F.linear, x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        of_x = multiply(torch.matmul, gradient, weight) if ctx.needs_input_grad[0] else None
        of_weight = weight_gradient(gradient.flatten(0, -2), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def weight_gradient(gradient_TO: Tensor, x_TI: Tensor) -> Tensor:
    """gradientᵀ · x, [O, I].

    oneDNN reads rows that are added up over three times as fast as columns, so the narrower side is transposed first.
    """
    if not has_transposes(gradient_TO):
        return multiply(torch.mm, gradient_TO.t(), x_TI)
    if x_TI.shape[1] >= gradient_TO.shape[1]:
        return passing_transpose(gradient_TO) @ x_TI
    turned_IT, product_IO = passing_transpose(x_TI), _passing.matrix("product", x_TI.shape[1], gradient_TO.shape[1])
    return kernels.transposed(torch.mm(turned_IT, gradient_TO, out=product_IO))


def passing_transpose(x_RC: Tensor) -> Tensor:
    """xᵀ, [C, R], in bf16, until this thread asks for another."""
    return kernels.transposed(x_RC, _passing.matrix("transpose", x_RC.shape[1], x_RC.shape[0]))


class _Passing(threading.local):
    """Memory of a thread for matrices that nobody keeps: among gradients, which stay, they would leave holes."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def matrix(self, use: str, rows: int, columns: int) -> Tensor:
        """[rows, columns] in bf16, of any values; each use has one at a time."""
        held = self._held.get(use)
        if held is None or len(held) < rows * columns:
            held = self._held[use] = torch.empty(rows * columns, dtype=torch.bfloat16)
        return held[: rows * columns].view(rows, columns)


_passing = _Passing()


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias, where there is one."""
    return x if bias is None else x + bias
