"""Differentiable all-to-all between the ranks of a group."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all(x: Tensor, group: dist.ProcessGroup, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """All-to-all over dim 0: the first `sent[0]` entries of `x` go to rank 0, the next `sent[1]` to rank 1, and so on.

    The result is what arrived from rank 0, rank 1, … in this order; gradients take the way back. Parts may differ in
    size: megatron-core's own all-to-all then works on CUDA only.
    """
    return _AllToAll.apply(x, group, list(sent), list(received))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
        ctx.exchange = group, sent, received
        return _exchanged(x, group, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group, sent, received = ctx.exchange
        return _exchanged(gradients[0], group, received, sent), None, None, None


def _exchanged(x: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
    arrived = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(arrived, x.contiguous(), received, sent, group=group)
    return arrived
