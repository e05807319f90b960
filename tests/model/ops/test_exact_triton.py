"""The kernels of exact numerics on a GPU, or in Triton's interpreter, which knows fp32 only; where Triton is there."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from lockstep.model.attention import exact_triton
from lockstep.model.attention.spec import AttentionSpec
from lockstep.model.ops.exact import triton_kernels
from tests.model.attention.test_packed import dense

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SCORINGS = [AttentionSpec(), AttentionSpec(cap=1.5, window=20), AttentionSpec(scale=0.3, window=70)]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).to(DEVICE)


def products() -> list[tuple[bool, bool]]:
    """Whether a product is right, and whether rows have the same bits alone."""
    found = []
    for dtype in DTYPES:
        x, weight = drawn(70, 100, dtype=dtype), drawn(90, 100, dtype=dtype)
        whole = triton_kernels.product(x, weight)
        near = torch.allclose(whole.double(), F.linear(x.double(), weight.double()), TOLERANCE[dtype], 1e-4)
        parts = [triton_kernels.product(x[a:b], weight) for a, b in ((0, 1), (1, 1), (1, 40), (40, 70))]
        found.append((near, torch.equal(torch.cat(parts), whole)))
    return found


def sums() -> list[tuple[bool, bool]]:
    x = drawn(5, 3000)
    whole = triton_kernels.row_sum(x)
    near = torch.allclose(whole.double(), x.double().sum(-1), 1e-5, 1e-4)
    return [(near, torch.equal(torch.cat([triton_kernels.row_sum(row) for row in x.split(1)]), whole))]


def attentions() -> list[tuple[bool, bool]]:
    found = []
    for dtype in DTYPES:
        for spec in SCORINGS:
            q, k, v = drawn(150, 6, 4, dtype=dtype), drawn(150, 2, 4, dtype=dtype), drawn(150, 2, 4, dtype=dtype)
            whole = exact_triton.attend_in_tiles(q[None], k[None], v[None], torch.tensor([0]).to(DEVICE), spec)[0]
            expected = dense([[150]], *(x.double().cpu() for x in (q, k, v)), spec)
            rows = (slice(0, 1), slice(37, 70), slice(149, 150))
            parts = [
                exact_triton.attend_in_tiles(
                    q[None, at], k[None, : at.stop], v[None, : at.stop], torch.tensor([at.start]).to(DEVICE), spec
                )[0]
                for at in rows
            ]
            near = torch.allclose(whole.double().cpu(), expected, TOLERANCE[dtype], TOLERANCE[dtype])
            found.append((near, all(torch.equal(part, whole[at]) for part, at in zip(parts, rows, strict=True))))
    return found


def test_kernels_are_right_and_give_rows_the_same_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels are defined: in a process of its own
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        for cases in (products, sums, attentions):
            for near, alone in process.submit(cases).result():
                assert near, cases
                assert alone, cases


def test_a_gpu_without_triton_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "triton", None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        triton_kernels.row_sum(torch.zeros(2, 3))
