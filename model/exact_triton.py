"""The sums of exact numerics on a GPU, as Triton kernels of fixed tiles: products, attention, sums over a row.

A library tunes its kernels to the number of rows, and splits long sums where there are few. Here a program's tile,
the order of its loop and its warps never change, and each row's sum stays in one program. What the functions here
take and return is said by those of the same purpose in `exact_product`, `exact_attention` and `exact`, which call them.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lockstep.model.scoring import PLAIN, Scoring

try:
    import triton
    import triton.language as tl
except ImportError:  # torch comes with it where there is a GPU
    triton, tl = None, SimpleNamespace(constexpr=None)

jit: Any = triton.jit if triton else lambda function: function

ROWS, COLUMNS, INNER = 64, 64, 32
"""Tile of a product, and the numbers that it adds up at once."""
QUERIES, KEYS = 16, 64
"""Rows that one program of attention holds, and positions that it sums over at once."""
PART = 1024
"""Numbers of a row that are summed at once."""
FIXED = {"num_warps": 4, "num_stages": 2}


def _need_triton() -> None:
    if triton is None:
        raise RuntimeError("numerics='exact' on a GPU needs Triton, which is not installed: pip install triton")


@jit
def _product(x, w, out, rows, outputs, inputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, inputs, INNER):
        k = start + tl.arange(0, INNER)
        a = tl.load(x + r[:, None] * inputs + k[None], mask=(r[:, None] < rows) & (k[None] < inputs), other=0.0)
        b = tl.load(w + c[None] * inputs + k[:, None], mask=(c[None] < outputs) & (k[:, None] < inputs), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    inside = (r[:, None] < rows) & (c[None] < outputs)
    tl.store(out + r[:, None] * outputs + c[None], total.to(out.dtype.element_ty), mask=inside)


def product(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """x · weightᵀ, [R, N]; in fp32 without TF32."""
    _need_triton()
    x, weight = x_RK.contiguous(), weight_NK.contiguous()
    (rows, inputs), outputs = x.shape, len(weight)
    out = x.new_empty(rows, outputs)
    grid = -(-rows // ROWS), -(-outputs // COLUMNS)
    if rows:
        _product[grid](x, weight, out, rows, outputs, inputs, ROWS=ROWS, COLUMNS=COLUMNS, INNER=INNER, **FIXED)
    return out


@jit
def _row_sum(x, out, width, PART: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((PART,), dtype=tl.float32)
    for start in range(0, width, PART):
        k = start + tl.arange(0, PART)
        total += tl.load(x + row * width + k, mask=k < width, other=0.0)
    tl.store(out + row, tl.sum(total, axis=0))


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last dim of fp32."""
    _need_triton()
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = rows.new_empty(len(rows))
    if len(rows):
        _row_sum[(len(rows),)](rows, out, rows.shape[1], PART=PART, **FIXED)
    return out.view(x.shape[:-1])


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
    q_NLHE: Tensor, k_NSGE: Tensor, v_NSGE: Tensor, first_N: Tensor, scoring: Scoring = PLAIN
) -> Tensor:
    """See `exact_attention.attend_in_tiles`; positions count from the first key. Softmax online (Dao et al. 2022)."""
    _need_triton()
    q, k, v = (x.contiguous() for x in (q_NLHE, k_NSGE, v_NSGE))
    n, length, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    out = torch.empty_like(q)
    _attention[(-(-length // QUERIES), n, heads)](
        q, k, v, out, first_N.to(torch.int64), length, keys, heads, heads // kv_heads,
        width**-0.5 if scoring.scale is None else scoring.scale,
        scoring.cap or 1.0,
        scoring.window or 1 << 40,
        width,
        QUERIES=QUERIES, KEYS=KEYS, WIDTH=max(16, 1 << (width - 1).bit_length()), CAPPED=scoring.cap is not None,
        **FIXED,
    )  # fmt: skip
    return out
