"""Fused RMSNorm, SwiGLU and rotary embedding, as autograd functions with hand-written gradients.

Each saves what its backward needs in the compute dtype and makes one pass over memory where autograd would make many;
on a CPU these would otherwise dominate a block, and not its matrix products.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.model.config import Numerics
from lockstep.model.ops.cpu import kernels
from lockstep.model.ops.exact import reductions


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, numerics: Numerics) -> Tensor:
        ctx.eps = eps
        if kernels.usable(x.dtype, x.device):
            ctx.save_for_backward(x, weight, None)
            return kernels.rms_norm(x, weight, eps)
        wide, mean = x.float(), _row_mean if numerics == "fast" else reductions.row_mean
        scale = torch.rsqrt(mean(wide.square()) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide.mul_(scale) if wide is not x else wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, scale = ctx.saved_tensors
        if kernels.usable(x.dtype, x.device):
            return *kernels.rms_norm_gradient(x, weight, gradient, ctx.eps), None, None
        scale = torch.rsqrt(_row_mean(x.float().square()) + ctx.eps) if scale is None else scale
        normed = x.float() * scale
        dy = gradient.float()
        d_weight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        dy = dy * weight.float()
        mean = (dy * normed).mean(-1, keepdim=True)
        return normed.mul_(mean).sub_(dy).mul_(-scale).to(x.dtype), d_weight, None, None


def _row_mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float, numerics: Numerics = "fast") -> Tensor:
    """x / rms(x) · weight over the last dim, reduced in fp32 (Zhang & Sennrich 2019, eq. 4)."""
    return _RMSNorm.apply(x, weight, eps, numerics)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, numerics: Numerics) -> Tensor:
        ctx.save_for_backward(gate_up)
        if kernels.usable(gate_up.dtype, gate_up.device):
            return kernels.swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate) if numerics == "fast" else reductions.silu(gate)).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (gate_up,) = ctx.saved_tensors
        if kernels.usable(gate_up.dtype, gate_up.device):
            return kernels.swiglu_gradient(gate_up, gradient), None
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=d_gate)
        return out, None


def swiglu(gate_up: Tensor, numerics: Numerics = "fast") -> Tensor:
    """silu(gate) · up, where gate and up are the halves of the last dim (Shazeer 2020, "GLU variants")."""
    return _SwiGLU.apply(gate_up, numerics)


def gated(gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) · up, where gate and up are the halves of the last dim (Shazeer 2020, "GLU variants")."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if kernels.usable(x.dtype, x.device):
        return kernels.rotary(x, (cos, sin))
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of heads [T, H, head_dim], from `Rope.table`; the first half of a head pairs with the second."""
    return _Rotary.apply(x, *table)
