"""Batch-invariant products and row sums on a GPU, as Triton kernels of fixed tiles; see `attention.exact_triton`, too.

A library tunes its kernels to the number of rows, and splits long sums where there are few. Here a program's tile,
the order of its loop and its warps never change, and each row's sum stays in one program. The functions are
called by those of the same names in `matmul` and `reductions`.
"""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch comes with it where there is a GPU
    triton, tl = None, SimpleNamespace(constexpr=None)

jit: Any = triton.jit if triton else lambda function: function

ROWS, COLUMNS, INNER = 64, 64, 32
"""Tile of a product, and the numbers that it adds up at once."""
PART = 1024
"""Numbers of a row that are summed at once."""
FIXED = {"num_warps": 4, "num_stages": 2}


def need_triton() -> None:
    """Raise a RuntimeError unless Triton is installed."""
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
    """Batch-invariant x · weightᵀ, [R, N]; in fp32 without TF32."""
    need_triton()
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
    """Sum over the last dim of fp32, in a fixed order."""
    need_triton()
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = rows.new_empty(len(rows))
    if len(rows):
        _row_sum[(len(rows),)](rows, out, rows.shape[1], PART=PART, **FIXED)
    return out.view(x.shape[:-1])
