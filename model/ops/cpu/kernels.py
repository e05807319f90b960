"""RMSNorm, SwiGLU, rotary embedding, linear products and sampling on the CPU, by the C loops of `kernels.c`.

Decoding on a CPU is bound by memory and by the cost of many small operations; each loop makes one pass over memory.
Their results are batch-invariant, which exact numerics need in training, too. Without a C compiler torch's operations
are used.
"""

from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.model.ops.cpu.jobs import (
    DrawJob,
    GateGradientJob,
    GateJob,
    LogitsGradientJob,
    LogSumsJob,
    NormGradientJob,
    NormJob,
    ProductJob,
    TransposedJob,
    TurnJob,
)
from lockstep.model.ops.cpu.library import NUMBERS, library_of, loaded, run

LINE, SIDE = 32, 16
"""Inputs and outputs of a tile of a weight."""
ROWS_OF_A_PART = 32
"""Rows whose gradients of a norm's weight are added up before others."""


def usable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are compiled loops for a dtype and device."""
    return device.type == "cpu" and dtype in NUMBERS and library_of(dtype) is not None


def log_sums(logits_KV: Tensor, temperature: float) -> Tensor:
    """Log-sum-exp of logits / temperature over each row, [K] in fp32."""
    if logits_KV.stride(1) != 1:
        logits_KV = logits_KV.contiguous()
    out = torch.empty(len(logits_KV))
    job = _over_logits(LogSumsJob, logits_KV, out, temperature)
    run("log_sums", job, logits_KV.dtype, size=logits_KV.numel())
    return out


def logits_gradient(
    logits_KV: Tensor, targets_K: Tensor, log_sums_K: Tensor, at_target_K: Tensor, spread_K: Tensor, temperature: float
) -> Tensor:
    """Gradient of logits, [K, V], from those of log-probabilities of targets and of log-sums.

    With p = softmax(logits / temperature) it is (at_target · 1[target] + spread · p) / temperature.

    Args:
        logits_KV: with contiguous rows.
        targets_K: columns; those outside of the logits belong to other ranks.
        log_sums_K: as of `log_sums`, over all ranks.
        at_target_K, spread_K: in fp32.
    """
    out = torch.empty_like(logits_KV)
    columns = [t.contiguous() for t in (targets_K, log_sums_K, at_target_K, spread_K)]
    job = _over_logits(LogitsGradientJob, logits_KV, out, temperature)
    job.targets, job.log_sums, job.at_target, job.spread = (t.data_ptr() for t in columns)
    run("logits_gradient", job, logits_KV.dtype, size=logits_KV.numel())
    return out


LogitsJob = TypeVar("LogitsJob", LogSumsJob, LogitsGradientJob)


def _over_logits(kind: type[LogitsJob], logits_KV: Tensor, out: Tensor, temperature: float) -> LogitsJob:
    """A job over rows of logits, each of which is contiguous."""
    return kind(
        rows=len(out),
        size=logits_KV.shape[1],
        stride=logits_KV.stride(0),
        logits=logits_KV.data_ptr(),
        out=out.data_ptr(),
        scale=1 / temperature,
    )


@cache
def tiled(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the processor has matrix tiles for products of a dtype: AMX, in bf16."""
    library = library_of(dtype) if device.type == "cpu" and dtype == torch.bfloat16 else None
    return hasattr(library, "may_use_tiles") and bool(loaded(dtype).may_use_tiles())


def in_tiles(weight: Tensor) -> Tensor:
    """Pack a weight [outputs, inputs] as `struct product` reads it, padded with zeros to multiples of `LINE`."""
    pair = 2 if weight.dtype.itemsize == 2 else 1
    whole = F.pad(weight.detach(), (0, -weight.shape[1] % LINE, 0, -weight.shape[0] % LINE))
    return whole.view(-1, SIDE, whole.shape[1] // pair, pair).transpose(1, 2).contiguous()


def product(x_RI: Tensor, weight: Tensor, outputs: int) -> Tensor:
    """Batch-invariant x · weightᵀ, [R, outputs]: a row's bits depend on that row and the weight alone.

    Args:
        weight: [outputs, inputs], or what `in_tiles` makes of it.
    """
    packed = weight.dim() == 4
    if short := -x_RI.shape[1] % LINE:
        x_RI, weight = F.pad(x_RI, (0, short)), weight if packed else F.pad(weight, (0, short))
    x, weight, out = x_RI.contiguous(), weight.contiguous(), x_RI.new_empty(len(x_RI), outputs)
    of_weight = (-(-outputs // LINE) * LINE if packed else outputs) * x.shape[1]
    if (x.dtype, of_weight) != (weight.dtype, weight.numel()):
        raise ValueError(f"x {list(x.shape)} in {x.dtype} does not fit a weight {list(weight.shape)} in {weight.dtype}")
    run("product", product_job(x, weight, out), x.dtype, size=len(x) * x.shape[1] * outputs)
    return out


def product_job(
    x_RI: Tensor, weight: Tensor, out_RO: Tensor, bias_O: Tensor | None = None, add_RO: Tensor | None = None
) -> ProductJob:
    """The call out = x · weightᵀ + bias + add, of contiguous tensors, which the caller must keep alive.

    Args:
        x_RI: of inputs that are a multiple of `LINE`.
        weight: [outputs, inputs], or what `in_tiles` makes of it.
    """
    job = ProductJob(
        rows=len(x_RI),
        inputs=x_RI.shape[1],
        outputs=out_RO.shape[1],
        tiled=tiled(x_RI.dtype, x_RI.device),
        packed=weight.dim() == 4,
        x=x_RI.data_ptr(),
        weight=weight.data_ptr(),
        out=out_RO.data_ptr(),
    )
    job.bias, job.add = (None if t is None else t.data_ptr() for t in (bias_O, add_RO))
    return job


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `fused.rms_norm`; without a gradient."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    job = NormJob(rows=rows, width=width, x=x.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), eps=eps)
    run("norm", job, x.dtype, size=x.numel())
    return out


def rms_norm_gradient(x: Tensor, weight: Tensor, gradient: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` by x and by the weight, in their dtype."""
    x, gradient, width = x.contiguous(), gradient.contiguous(), x.shape[-1]
    rows = x.numel() // width
    out, of_weight = torch.empty_like(x), torch.empty(-(-rows // ROWS_OF_A_PART), width)
    job = NormGradientJob(
        rows=rows,
        width=width,
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        gradient=gradient.data_ptr(),
        out=out.data_ptr(),
        of_weight=of_weight.data_ptr(),
        eps=eps,
    )
    run("norm_gradient", job, x.dtype, size=x.numel())
    return out, of_weight.sum(0).to(weight.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `fused.swiglu`; without a gradient."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    job = GateJob(rows=gate_up.numel() // (2 * width), width=width, x=gate_up.data_ptr(), out=out.data_ptr())
    run("gate", job, gate_up.dtype, size=gate_up.numel())
    return out


def swiglu_gradient(gate_up: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of `swiglu`."""
    gate_up, gradient, width = gate_up.contiguous(), gradient.contiguous(), gradient.shape[-1]
    out = torch.empty_like(gate_up)
    job = GateGradientJob(
        rows=gate_up.numel() // (2 * width),
        width=width,
        x=gate_up.data_ptr(),
        gradient=gradient.data_ptr(),
        out=out.data_ptr(),
    )
    run("gate_gradient", job, gate_up.dtype, size=gate_up.numel())
    return out


def transposed(x_RC: Tensor, out_CR: Tensor | None = None) -> Tensor:
    """A contiguous copy of xᵀ, [C, R]: torch's own takes several times as long where rows are long."""
    rows, columns = x_RC.shape
    out = x_RC.new_empty(columns, rows) if out_CR is None else out_CR
    if x_RC.stride(1) != 1:
        return out.copy_(x_RC.t())
    job = TransposedJob(rows=rows, columns=columns, stride=x_RC.stride(0), x=x_RC.data_ptr(), out=out.data_ptr())
    run("transposed", job, x_RC.dtype, size=x_RC.numel())
    return out


def rotary(x_THE: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """See `fused.rotary`; without a gradient."""
    rows, heads, width = x_THE.shape
    if x_THE.stride()[1:] != (width, 1):
        x_THE = x_THE.contiguous()
    cosines, sines = (t.contiguous() for t in table)
    out = x_THE.new_empty(rows, heads, width)
    job = TurnJob(
        rows=rows,
        heads=heads,
        width=width,
        stride=x_THE.stride(0),
        out_stride=heads * width,
        x=x_THE.data_ptr(),
        cosines=cosines.data_ptr(),
        sines=sines.data_ptr(),
        out=out.data_ptr(),
    )
    run("turn", job, x_THE.dtype, size=x_THE.numel())
    return out


def draw(logits_BV: Tensor, rows: Sequence[int], temperatures: Sequence[float], shares: Sequence[float]) -> Tensor:
    """Sample a token for each of some rows of logits by inverse transform sampling.

    It is the first token whose cumulative probability exceeds the row's share; none of probability 0 is sampled.

    Args:
        rows: indices into `logits_BV`.
        shares: the cumulative probability to exceed in each row; uniform in [0, 1) for a random draw.

    Raises:
        FloatingPointError: where logits are NaN.
    """
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    places, wanted = np.asarray(rows, np.int64), np.asarray(shares, np.float64)
    scales = (1 / np.asarray(temperatures)).astype(np.float32)
    tokens = np.empty(len(rows), np.int64)
    job = DrawJob(
        rows=len(rows),
        size=logits_BV.shape[1],
        stride=logits_BV.stride(0),
        logits=logits_BV.data_ptr(),
        places=places.ctypes.data,
        scales=scales.ctypes.data,
        shares=wanted.ctypes.data,
        tokens=tokens.ctypes.data,
    )
    run("draw", job, logits_BV.dtype, size=logits_BV.numel())
    if tokens.min() < 0:
        raise FloatingPointError("logits are not numbers, so nothing can be drawn: the weights are not whole")
    return torch.from_numpy(tokens)
