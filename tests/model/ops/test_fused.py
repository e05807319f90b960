"""The block's hand-written derivatives against autograd."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.model.attention.spec import soft_capped
from lockstep.model.ops.fused import gated, rms_norm, rotary, swiglu
from lockstep.model.rope import Rope
from tests.model.exact_rollouts import WAYS, by_way

LOOSE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-2, 3e-2)}
DTYPES = pytest.mark.parametrize("dtype", LOOSE, ids=str)
SHAPES = pytest.mark.parametrize("shape", [(1, 1, 8), (7, 1, 48), (5, 3, 16), (70, 1, 54)], ids=str)


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def check(ours: Callable[..., Tensor], naive: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Equal values and gradients; the naive version computes in fp64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    before = [x.detach().clone() for x in inputs]
    mine, theirs = ours(*inputs), naive(*wide)
    slope = normal(mine.shape, mine.dtype, 9).detach()
    rtol, atol = LOOSE[mine.dtype]
    assert torch.allclose(mine.double(), theirs, rtol=rtol, atol=atol)
    kept = slope.clone()
    found = torch.autograd.grad(mine, list(inputs), slope)
    expected = torch.autograd.grad(theirs, wide, slope.double())
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == mine.dtype
        assert torch.allclose(a.double(), b, rtol=rtol, atol=atol * max(1.0, b.abs().max().item()))
    for x, old in zip([*inputs, slope], [*before, kept], strict=True):
        assert torch.equal(x, old), "an input was written to"


@WAYS
@DTYPES
@SHAPES
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, eps: float, compiled: bool) -> None:
    def naive(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    x, weight = normal(shape, dtype, 0), normal(shape[-1:], dtype, 1)
    with by_way(compiled):
        check(lambda x, w: rms_norm(x, w, eps), naive, [x, weight])


@WAYS
@DTYPES
@SHAPES
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, compiled: bool) -> None:
    def naive(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    with by_way(compiled):
        check(swiglu, naive, [normal(shape, dtype, 2)])


@DTYPES
@SHAPES
def test_gated(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def naive(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up

    check(lambda x: gated(x, F.gelu), naive, [normal(shape, dtype, 7)])


def test_soft_capped() -> None:
    scores = normal((5, 7), torch.float32, 8)
    check(lambda x: soft_capped(x, 0.8), lambda x: 0.8 * torch.tanh(x / 0.8), [scores])
    assert soft_capped(scores, None) is scores


@WAYS
@DTYPES
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 8), (2, 64)])
def test_rotary(heads: int, width: int, dtype: torch.dtype, compiled: bool) -> None:
    positions = torch.tensor([0, 1, 2, 0, 100, 7])

    def naive(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        powers = torch.arange(width // 2, dtype=torch.float64) * 2 / width
        angles = positions[:, None, None] / 5000.0**powers
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    table = Rope(theta=5000.0).table(positions, width, dtype)
    with by_way(compiled):
        check(lambda x: rotary(x, table), naive, [normal((6, heads, width), dtype, 3)])


def test_rotary_of_a_part_of_a_larger_tensor() -> None:
    whole = normal((4, 5, 8), torch.float32, 4)
    table = Rope(theta=100.0).table(torch.arange(4), 8, torch.float32)
    part = whole[:, 1:4]
    assert torch.equal(rotary(part, table), rotary(part.contiguous(), table))


def test_derivatives_by_finite_differences() -> None:
    gate_up = normal((3, 1, 6), torch.float64, 5)
    assert torch.autograd.gradcheck(swiglu, (gate_up,))
    heads = normal((3, 2, 4), torch.float64, 6)
    cos, sin = Rope(theta=100.0).table(torch.arange(3), 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotary(x, (cos, sin)), (heads,))


def test_silu_agrees_with_torch_where_it_saturates() -> None:
    gate = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]])
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=-1).requires_grad_()
    out = swiglu(gate_up)
    out.sum().backward()
    assert torch.equal(out.detach(), F.silu(gate))
    assert gate_up.grad is not None
    assert torch.equal(gate_up.grad[0, :5], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@DTYPES
def test_gradients_have_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    x, weight, slope = normal((700, 96), dtype, 1), normal((96,), dtype, 2), normal((700, 96), dtype, 3).detach()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        of_norm = torch.autograd.grad(rms_norm(x, weight, 1e-5), [x, weight], slope)
        found.append([*of_norm, *torch.autograd.grad(swiglu(x), [x], slope[:, :48])])
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
