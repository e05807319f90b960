"""Gradients of linear layers by transposed copies, and the copies, against torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from lockstep.model.ops.cpu import kernels
from lockstep.model.ops.linear import has_transposes, project, weight_gradient
from tests.model.exact_rollouts import WAYS, by_way
from tests.model.processors import KERNELS, processor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@given(rows=st.integers(0, 130), columns=st.integers(1, 300), skipped=st.integers(0, 40), threads=st.integers(1, 3))
@example(rows=64, columns=128, skipped=0, threads=2)
@example(rows=33, columns=32, skipped=1, threads=1)
def test_a_transposed_copy_is_the_transpose(
    dtype: torch.dtype, rows: int, columns: int, skipped: int, threads: int
) -> None:
    x = torch.arange(rows * (columns + skipped)).view(rows, columns + skipped).to(dtype)[:, skipped:]
    torch.set_num_threads(threads)
    found = kernels.transposed(x)
    torch.set_num_threads(1)
    assert found.is_contiguous()
    assert torch.equal(found, x.t())
    assert torch.equal(kernels.transposed(x.t()), x)


@WAYS
@KERNELS
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 200), (200, 48), (7, 7)])
def test_a_projection_has_the_gradients_of_torch(inputs: int, outputs: int, compiled: bool, bf16_kernels: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, slope = (
        torch.randn(shape, generator=draw, dtype=torch.float64).bfloat16()
        for shape in ((5, 3, inputs), (outputs, inputs), (5, 3, outputs))
    )
    given_ = [x.requires_grad_(), weight.requires_grad_()]
    with by_way(compiled), processor(bf16_kernels):
        assert has_transposes(weight) == (compiled and bf16_kernels)
        ours = project(x, weight)
        found = torch.autograd.grad(ours, given_, slope)
    theirs = F.linear(*(t.double() for t in given_))
    expected = torch.autograd.grad(theirs, given_, slope.double())
    for a, b in zip((ours, *found), (theirs, *expected), strict=True):
        assert a.dtype == torch.bfloat16
        assert a.is_contiguous()
        assert torch.allclose(a.double(), b.double(), rtol=2e-2, atol=2e-2)
    weight.requires_grad_(False)
    project(x, weight).sum().backward()
    assert weight.grad is None


@KERNELS
def test_the_gradient_of_a_weight_is_a_product_of_either_side_transposed(bf16_kernels: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    for tokens, outputs, inputs in ((37, 300, 64), (256, 64, 300), (90, 96, 96)):
        gradient, x = (torch.randn(tokens, n, generator=draw).bfloat16() for n in (outputs, inputs))
        with processor(bf16_kernels):
            found = weight_gradient(gradient, x)
        expected = gradient.float().t() @ x.float()
        assert torch.allclose(found.float(), expected, rtol=1e-2, atol=1e-2)
