"""Batch-invariant matrix products: a row's bits depend on that row and the weight alone.

On a CPU a kernel of our own adds up every row in the same order (`kernels.product`). Where there is no compiler for it,
torch multiplies: its libraries pick their kernel, and with it the order in which a row is summed, by the number of rows
and of threads. So these products have one of a few fixed numbers of rows, the last padded, and one thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.model.ops.cpu import kernels
from lockstep.model.ops.exact import triton_kernels
from lockstep.model.ops.exact.reductions import row_sum
from lockstep.model.ops.upcast import multiply

TILE = 32
"""Rows of a product; fewer wait for the weight to be read, more are lost where one row is wanted."""

LARGER: tuple[int, ...] = (1024, 512, 256, 128, 64)
"""Rows of a product where a trial on this machine gave the same bits as `TILE` rows do."""

TRIED = 1 << 15
"""Numbers that a trial compares, at least."""

NARROW = 16
"""Outputs of a weight, at most, that are added up here, one by one, where no kernel of the library will do."""


class NotExact(RuntimeError):
    """This machine's kernels do not give a row the same bits at every place."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Batch-invariant x · weightᵀ, [..., inputs] → [..., outputs]; gradients are those of `F.linear`, not invariant."""
    return _Product.apply(x, weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows, outputs = x.reshape(-1, x.shape[-1]), weight.shape[0]
        if x.is_cuda:
            out = triton_kernels.product(rows, weight)
        elif kernels.usable(weight.dtype, weight.device):
            out = kernels.product(rows, weight, outputs)
        elif tile_sizes(weight.shape[1], outputs, weight.dtype):
            out = _in_tiles(rows.contiguous(), weight)
        else:
            out = _summed(rows, weight)
        return out.view(*x.shape[:-1], outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, weight.shape[0])
        d_x = multiply(torch.mm, gradient, weight)
        return d_x.view(x.shape), multiply(torch.mm, gradient.t(), x.reshape(-1, weight.shape[1]))


def _in_tiles(rows: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ by torch, in tiles of a few fixed numbers of rows."""
    sizes, parts, start = tile_sizes(weight.shape[1], weight.shape[0], weight.dtype), [], 0
    with one_thread():
        while start < len(rows):
            left = len(rows) - start
            size = next((size for size in sizes if left > size // 3), TILE)
            tile = rows[start : start + size]
            full = tile if len(tile) == size else F.pad(tile, (0, 0, 0, size - len(tile)))
            parts.append(F.linear(full, weight)[: len(tile)])
            start += size
    return parts[0] if len(parts) == 1 else torch.cat([rows.new_empty(0, weight.shape[0]), *parts])


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this block torch uses one thread, so that no sum is split between threads."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def tile_sizes(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The tile sizes (rows), largest first, at which products with weights of this shape have equal bits on this CPU.

    Empty where the bits even depend on a row's place among `TILE`, as those of MKL's kernels for two to nine outputs do
    on some processors, and the weight is `NARROW` enough to be added up one product after the other.

    Raises:
        NotExact: where it is wider.
    """
    x, sizes = delicate(LARGER[0], inputs, dtype, 0), LARGER
    for weight in trial_weights(outputs, inputs, dtype):
        with torch.inference_mode(), one_thread():
            expected = _by(TILE, x, weight)
            moved = torch.cat([F.linear(tile.roll(5, 0), weight).roll(-5, 0) for tile in x.split(TILE)])
            if not torch.equal(moved, expected):
                if outputs <= NARROW:
                    return ()
                raise NotExact(
                    f"products with a weight [{outputs}, {inputs}] in {dtype} give a row other bits at another place: "
                    "numerics='exact' needs another processor or another build of torch"
                )
            sizes = tuple(size for size in sizes if torch.equal(_by(size, x, weight), expected))
    return *sizes, TILE


def _summed(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ by a sum over each row's products, in fp32, one output at a time."""
    x, outputs = x.float(), weight.float()
    return torch.stack([row_sum(x * output) for output in outputs], dim=-1).to(weight.dtype)


def _by(size: int, x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([F.linear(tile, weight) for tile in x.split(size)])


def trial_weights(outputs: int, inputs: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Weights for a trial, so many that `TRIED` numbers come out: those of one narrow weight might agree by chance."""
    for trial in range(-(-TRIED // (LARGER[0] * outputs))):
        yield delicate(outputs, inputs, dtype, 2 * trial + 1)


def delicate(rows: int, width: int, dtype: torch.dtype, side: int) -> Tensor:
    """Random rows whose products with those of the other side are 0, so that all bits of a result are rounding errors.

    Two sums of the same numbers in another order seldom differ after rounding to bf16; these do.

    Args:
        side: even for one, odd for the other; each number draws other rows.
    """
    half = width // 2
    drawn = torch.randn(rows, half, generator=torch.Generator().manual_seed(side))
    last = torch.full((rows, width % 2), 2.0**-20)
    whole = torch.cat((drawn, -drawn if side % 2 else drawn, last), dim=1)
    return whole[:, torch.randperm(width, generator=torch.Generator().manual_seed(2))].to(dtype)
