"""Batch-invariant attention on a GPU, as a Triton kernel of fixed tiles: the counterpart of `exact.attend_exactly`."""

import torch
from torch import Tensor

from lockstep.model.attention.spec import PLAIN, AttentionSpec
from lockstep.model.ops.exact.triton_kernels import FIXED, jit, need_triton, tl

QUERIES, KEYS = 16, 64
"""Rows that one program of attention holds, and positions that it sums over at once."""


@jit
def _attention(
    q, k, v, out, first, length, keys, heads, repeats, scale, cap, window, width,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    n, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    kv_heads, g = heads // repeats, h // repeats
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    lane, inside = tl.arange(0, WIDTH), tl.arange(0, WIDTH) < width
    begin = tl.load(first + n)
    position = begin + row
    at = ((n * length + row[:, None]) * heads + h) * width + lane[None]
    rows = tl.load(q + at, mask=(row[:, None] < length) & inside[None], other=0.0)
    most = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    mixed = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    last = tl.minimum(keys, begin + (tl.program_id(0) + 1) * QUERIES)
    for start in range(0, last, KEYS):
        column = start + tl.arange(0, KEYS)
        place = ((n * keys + column) * kv_heads + g) * width
        there = column < keys
        block = tl.load(k + place[None] + lane[:, None], mask=there[None] & inside[:, None], other=0.0)
        score = tl.dot(rows, block, input_precision="ieee") * scale
        if CAPPED:
            score = cap * (1 - 2 / (tl.exp(2 * score / cap) + 1))
        seen = there[None] & (column[None] <= position[:, None]) & (column[None] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        against = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - against[:, None])
        kept = tl.exp(most - against)
        block = tl.load(v + place[:, None] + lane[None], mask=there[:, None] & inside[None], other=0.0)
        mixed = mixed * kept[:, None] + tl.dot(weight, block.to(tl.float32), input_precision="ieee")
        total = total * kept + tl.sum(weight, axis=1)
        most = higher
    mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=(row[:, None] < length) & inside[None])


def attend_in_tiles(
    q_NLHE: Tensor, k_NSGE: Tensor, v_NSGE: Tensor, first_N: Tensor, spec: AttentionSpec = PLAIN
) -> Tensor:
    """See `exact.attend_exactly`; here positions count from the first key. Online softmax (Dao et al. 2022)."""
    need_triton()
    q, k, v = (x.contiguous() for x in (q_NLHE, k_NSGE, v_NSGE))
    n, length, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    out = torch.empty_like(q)
    _attention[(-(-length // QUERIES), n, heads)](
        q, k, v, out, first_N.to(torch.int64), length, keys, heads, heads // kv_heads,
        width**-0.5 if spec.scale is None else spec.scale,
        spec.cap or 1.0,
        spec.window or 1 << 40,
        width,
        QUERIES=QUERIES, KEYS=KEYS, WIDTH=max(16, 1 << (width - 1).bit_length()), CAPPED=spec.cap is not None,
        **FIXED,
    )  # fmt: skip
    return out
