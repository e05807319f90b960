"""Batch-invariant sums, means, softmax, activations and all-reduces: a row's bits do not depend on other rows.

Fast numerics leave the order of sums to libraries. Here every order is fixed: over a row, over tensor ranks and, in
other modules, in products and attention. Elementwise functions are composed of operations that give the same bits at
any position in a tensor. torch's sigmoid, silu and gelu do not: they compute the last
few numbers of a thread's part by other instructions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.distributed.world.collectives import all_to_all
from lockstep.model.ops.exact import triton_kernels

PART = 16_384
"""Numbers that are summed in one go: torch splits longer sums between threads."""


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last dim, in an order that depends on its length only."""
    if x.is_cuda:
        return triton_kernels.row_sum(x)
    whole = x.shape[-1] // PART * PART
    if x.shape[-1] <= PART:
        return x.sum(-1)
    parts = x[..., :whole].unflatten(-1, (-1, PART)).sum(-1)
    return torch.cat((parts, x[..., whole:].sum(-1, keepdim=True)), dim=-1).sum(-1)


def row_mean(x: Tensor) -> Tensor:
    """Mean over the last dim, which is kept with size 1."""
    return (row_sum(x) / x.shape[-1])[..., None]


def log_sum_exp(x: Tensor) -> Tensor:
    """Log-sum-exp over the last dim; −∞ where all elements are."""
    most = x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).min)
    return row_sum((x - most).exp()).log() + most[..., 0]


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dim."""
    weights = (x - x.amax(-1, keepdim=True)).exp()
    return weights / row_sum(weights)[..., None]


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(−x)), computed in fp32."""
    return (1 / (1 + (-x.float()).exp())).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x), computed in fp32."""
    wide = x.float()
    return (wide / (1 + (-wide).exp())).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), computed in fp32 (Hendrycks & Gimpel 2016)."""
    wide = x.float()
    return (0.5 * wide * (1 + (wide * math.sqrt(0.5)).erf())).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation of Φ (Hendrycks & Gimpel 2016, section 2), computed in fp32."""
    wide = x.float()
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * (wide * wide * wide))
    return (0.5 * wide * (1 + inner.tanh())).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def in_order(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors from the first to the last, in fp32, rounded once to their dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def gathered(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """All-gather: every rank's tensor, in rank order; without a gradient."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    return parts


def summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-reduce that adds in rank order: a ring's order differs from element to element."""
    return part if group.size() == 1 else _Summed.apply(part, group)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        return in_order(gathered(part, group))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def summed_and_split(part_T: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Reduce-scatter over dim 0 that adds in rank order, [T, …] → [T / ranks, …]."""
    ranks = group.size()
    each = [len(part_T) // ranks] * ranks
    return in_order(all_to_all(part_T, group, each, each).chunk(ranks))
