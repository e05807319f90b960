"""Batch-invariant attention: a row's bits depend only on its query and the keys that it sees, at their positions.

Sums run over blocks of 64 positions, one block after the other. What a row does not see adds exact zeros, so that
neither padding nor a later token changes it, and the maximum score does not depend on an order. Trainer and rollouts
use the same one of three implementations: the paged CPU kernel, on a GPU Triton kernels of fixed tiles, and without a C
compiler torch's matrix products.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.model.attention import exact_triton
from lockstep.model.attention.paged_kernel import BLOCK, PagedKernel, Rows, block_shapes, serves
from lockstep.model.attention.spec import PLAIN, AttentionSpec, soft_capped
from lockstep.model.ops.exact.matmul import NotExact, delicate, one_thread

KEYS = 64
"""Positions that are summed over at once."""

POSITIONS_AT_ONCE = 128
"""Queries of a sequence whose scores are computed together, up to the last key that any of them sees."""


def attend_exactly(
    q_NLHE: Tensor,
    k_NGSE: Tensor,
    v_NGSE: Tensor,
    first_N: Tensor,
    spec: AttentionSpec = PLAIN,
    keys_from: int | Tensor = 0,
) -> Tensor:
    """Batch-invariant attention of N sequences, [N, L, H, E] in the dtype of the queries.

    It has no gradient: see `with_gradient`. Row l of sequence n stands at position first_N[n] + l and sees the keys up
    to there, or those in its window. Padding of N, L and S changes no bit of a row that sees a key.

    Args:
        k_NGSE: keys at the positions keys_from, keys_from + 1, …; what no row sees may be any finite number.
        keys_from: multiples of 64, one for all sequences or [N]: at most the first position that a row sees.

    Raises:
        NotExact: where torch's products are used, and those of this machine are not batch-invariant.
    """
    if q_NLHE.is_cuda:
        k, v = k_NGSE.transpose(1, 2), v_NGSE.transpose(1, 2)
        return exact_triton.attend_in_tiles(q_NLHE, k, v, first_N - keys_from, spec)
    way = _by_kernel if serves(q_NLHE.dtype, q_NLHE.device, q_NLHE.shape[3]) else _by_products
    return way(q_NLHE, k_NGSE, v_NGSE, first_N, spec, torch.as_tensor(keys_from))


def _by_kernel(
    q_NLHE: Tensor, k_NGSE: Tensor, v_NGSE: Tensor, first_N: Tensor, spec: AttentionSpec, keys_from: Tensor
) -> Tensor:
    """By the paged CPU kernel: keys and values are written into blocks, as into a KV cache."""
    n, length, _, width = q_NLHE.shape
    groups, keys = k_NGSE.shape[1:3]
    each = -(-keys // BLOCK)
    sequences, columns, begin = np.arange(n)[:, None], np.arange(keys), keys_from.numpy().reshape(-1, 1)
    places = sequences * each + columns // BLOCK, np.broadcast_to(columns % BLOCK, (n, keys))
    skipped = begin // BLOCK
    tables = sequences * each + (np.arange(each + skipped.max()) - skipped).clip(0, each - 1)
    lasts = np.minimum(first_N.numpy()[:, None] + np.arange(length), begin + keys - 1)
    rows = Rows(np.arange(n * length), np.repeat(np.arange(n), length), lasts.flatten(), tables)
    attend = PagedKernel((places[0].flatten(), places[1].flatten()), rows, spec.window, groups=groups, width=width)
    held, values = (q_NLHE.new_zeros(n * each, groups, *shape) for shape in block_shapes(q_NLHE.dtype, width))
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k_NGSE, v_NGSE))
    return attend(held, values, q_NLHE.flatten(0, 1), k, v, spec).unflatten(0, (n, length))


def _by_products(
    q_NLHE: Tensor, k_NGSE: Tensor, v_NGSE: Tensor, first_N: Tensor, spec: AttentionSpec, keys_from: Tensor
) -> Tensor:
    n, length, heads, width = q_NLHE.shape
    kv_heads, repeats = k_NGSE.shape[1], heads // k_NGSE.shape[1]
    k, v = _in_blocks(k_NGSE), _in_blocks(v_NGSE)
    first = first_N - keys_from
    out = q_NLHE.new_empty(n, length, heads, width)
    with one_thread():
        for start, stop, columns in _spans(length, k.shape[1], first, spec.window):
            rows = q_NLHE[:, start:stop].float().unflatten(2, (kv_heads, repeats)).permute(0, 2, 1, 3, 4)
            rows = _padded(rows.reshape(n * kv_heads, -1, width), row_tile(width))
            positions = first[:, None] + start + torch.arange(rows.shape[1], device=first.device) // repeats
            mixed = _mixed(rows, k[:, columns], v[:, columns], positions - columns.start, spec)
            mixed = mixed[:, : (stop - start) * repeats].view(n, kv_heads, stop - start, repeats, width)
            out[:, start:stop] = mixed.permute(0, 2, 1, 3, 4).flatten(2, 3)
    return out


def _in_blocks(x_NGSE: Tensor) -> Tensor:
    """[N · G, S, E] in fp32, with zeros up to a whole block."""
    n, heads, length, width = x_NGSE.shape
    if length % KEYS == 0 and x_NGSE.is_contiguous():
        return x_NGSE.float().flatten(0, 1)
    out = torch.empty(n, heads, length + -length % KEYS, width, device=x_NGSE.device)
    out[:, :, :length] = x_NGSE
    out[:, :, length:] = 0
    return out.flatten(0, 1)


def _padded(rows: Tensor, tile: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, -rows.shape[1] % tile))


def _spans(length: int, keys: int, first_N: Tensor, window: int | None) -> Iterator[tuple[int, int, slice]]:
    """First row, end of rows, and the range of keys that any of these rows sees."""
    least, most = int(first_N.min()), int(first_N.max())
    for start in range(0, length, POSITIONS_AT_ONCE):
        stop = min(start + POSITIONS_AT_ONCE, length)
        last = min(keys, max(KEYS, -(-(most + stop) // KEYS) * KEYS))
        begin = 0 if window is None else max(0, least + start - window + 1) // KEYS * KEYS
        yield start, stop, slice(min(begin, last - KEYS), last)


def _mixed(q_BRE: Tensor, k_BSE: Tensor, v_BSE: Tensor, position_NR: Tensor, spec: AttentionSpec) -> Tensor:
    """Of rows that see the columns up to their positions, [B, R, E] in fp32."""
    weights = _weights(q_BRE, k_BSE, position_NR, spec)
    out = torch.zeros_like(q_BRE)
    sums = weights.unflatten(-1, (-1, KEYS)).sum(-1)
    total = torch.zeros_like(sums[..., 0])
    for block, start in enumerate(range(0, weights.shape[2], KEYS)):
        columns = slice(start, start + KEYS)
        out = out + torch.bmm(weights[:, :, columns], v_BSE[:, columns])
        total = total + sums[..., block]
    return out / total.clamp(min=1)[..., None]  # 1 is what the largest score adds: rows of padding may see none


def _weights(q_BRE: Tensor, k_BSE: Tensor, position_NR: Tensor, spec: AttentionSpec) -> Tensor:
    """exp(score − the row's largest), [B, R, S]; 0 where a row does not see a column."""
    scale = q_BRE.shape[2] ** -0.5 if spec.scale is None else spec.scale
    scores = soft_capped(torch.bmm(q_BRE, k_BSE.transpose(1, 2)) * scale, spec.cap)
    columns, last = torch.arange(k_BSE.shape[1], device=q_BRE.device), position_NR[:, :, None]
    hidden = columns > last
    if spec.window is not None:
        hidden |= columns <= last - spec.window
    by_sequence = scores.unflatten(0, (len(position_NR), -1))
    by_sequence.masked_fill_(hidden[:, None], float("-inf"))
    return (scores - scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)).exp()


@cache
def row_tile(width: int) -> int:
    """The number of rows that queries are padded to, so that products of heads of this width are batch-invariant here.

    Raises:
        NotExact: where there is no such number.
    """
    q, k = delicate(384, width, torch.float32, 0), delicate(16 * KEYS, width, torch.float32, 1)
    p, v = delicate(384, KEYS, torch.float32, 0), delicate(width, KEYS, torch.float32, 1).t().contiguous()
    with torch.inference_mode(), one_thread():
        for tile in (8, 16, 32, 64):
            if _agrees(tile, q, k.t()) and _agrees(tile, p, v):
                return tile
    raise NotExact(
        f"attention with heads of {width} gives a row other bits where rows stand beside it: "
        "numerics='exact' needs another processor or another build of torch"
    )


def _agrees(tile: int, rows: Tensor, columns: Tensor) -> bool:
    """Whether products of few rows, of many, and of several sequences at once are the same bits."""
    few = torch.cat([torch.bmm(part[None], columns[None]) for part in rows.split(tile)], dim=1)
    blocks = torch.cat([torch.bmm(rows[None], part[None].contiguous()) for part in columns.split(KEYS, dim=1)], dim=2)
    several = torch.bmm(rows.unflatten(0, (-1, tile)), columns.expand(len(rows) // tile, -1, -1)).flatten(0, 1)[None]
    moved = torch.bmm(rows.roll(5, 0)[None], columns[None]).roll(-5, 1)
    return all(torch.equal(few, other) for other in (blocks, several, moved))


def with_gradient(value: Callable[..., Tensor], like: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """value(*tensors) with the gradient of like(*tensors), which the backward pass recomputes."""
    return _WithGradient.apply(value, like, *tensors)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Callable[..., Tensor], like: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.like = like
        return value(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.like(*inputs)
        return None, None, *torch.autograd.grad(out, inputs, gradients[0])
