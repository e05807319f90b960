"""The CPU kernel of FlashAttention for packed documents, in training: no padding, no gathers, no queries × keys tensor.

Tokens are read where they lie. Each document is computed by itself, in blocks that begin where its prompt and branches
do, so that its results depend neither on other documents of the row nor on the number of threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.model.attention.spec import AttentionSpec
from lockstep.model.ops.cpu import kernels
from lockstep.model.ops.cpu.jobs import FlashJob
from lockstep.model.ops.cpu.library import run

LINE, STRIPE = 32, 16
"""Tokens of a block, and blocks of keys whose gradients one thread sums up, as in `flash_attention.c`."""

WIDEST = 256
"""The largest head dim that the kernel takes."""

FARTHEST = 1 << 30
"""A window that hides nothing, in tokens."""


@dataclass(frozen=True)
class Segment:
    """Tokens start … start+length of a row, which also see the `seen` tokens from `prompt` on."""

    start: int
    length: int
    prompt: int
    """Where their document begins."""
    seen: int


def serves(q_THE: Tensor, spec: AttentionSpec) -> bool:
    """Whether the kernel can be used: on a CPU, for head dims 16, 32, … 256, without a soft cap."""
    width = q_THE.shape[2]
    fits = width % 16 == 0 and 0 < width <= WIDEST and spec.cap is None and (spec.scale is None or spec.scale > 0)
    return fits and kernels.usable(q_THE.dtype, q_THE.device)


class FlashKernel:
    """Causal attention within the documents of a packed row, with gradients (Dao 2023, FlashAttention-2)."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        """
        Args:
            segments: of all tokens, in order; those of a document follow its prompt.
        """
        blocks: list[tuple[int, ...]] = []
        stripes: list[tuple[int, ...]] = []
        for _, members in groupby((s for s in segments if s.length), key=lambda s: s.prompt):
            first = len(blocks)
            for segment in members:
                blocks += _blocks(segment, first, len(blocks))
            end = len(blocks)
            starts = range(first, end, STRIPE)
            stripes += [(i, start, min(start + STRIPE, end), end) for i, start in enumerate(starts)]
        self.blocks, self.stripes = np.array(blocks, np.int32), np.array(stripes, np.int32)
        self.in_parts = len(stripes) > len({end for *_, end in stripes})

    def __call__(self, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec) -> Tensor:
        """Attention [T, H, E]; see `serves`."""
        q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q_THE, k_TGE, v_TGE))
        out: Tensor = _Flash.apply(q, k, v, self, spec)
        return out

    def job(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scratch: Sequence[str]) -> "_Call":
        """The C struct of a call, with room for these of its packed arrays."""
        job = FlashJob(
            blocks=len(self.blocks),
            stripes=len(self.stripes),
            heads=q.shape[1],
            groups=k.shape[1],
            width=q.shape[2],
            window=min(spec.window or FARTHEST, FARTHEST),
            tiled=kernels.tiled(q.dtype, q.device),
            table=self.blocks.ctypes.data,
            parts=self.stripes.ctypes.data,
            scale=q.shape[2] ** -0.5 if spec.scale is None else spec.scale,
        )
        job.q_stride, job.k_stride, job.v_stride = (x.stride(0) for x in (q, k, v))
        call = _Call(job, q.dtype, q.numel())
        call.bind(q=q, k=k, v=v)
        size = LINE * -(-q.shape[2] // LINE) * LINE
        call.bind(**{name: q.new_empty(len(self.blocks), k.shape[1], size) for name in scratch})
        return call


class _Call:
    """A call of the kernel, and the tensors that it reads and writes."""

    def __init__(self, job: FlashJob, dtype: torch.dtype, size: int) -> None:
        self._job, self._dtype, self._size = job, dtype, size
        self._kept: list[Tensor] = []

    def bind(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                setattr(self._job, name, tensor.data_ptr())
                self._kept.append(tensor)

    def run(self, name: str) -> None:
        run(name, self._job, self._dtype, size=self._size)


def _blocks(segment: Segment, document: int, own: int) -> list[tuple[int, ...]]:
    """`struct block` of each `LINE` tokens of a segment, given the first block of its document and its own."""
    prompts = -(-segment.seen // LINE)
    return [
        (segment.start + i, min(LINE, segment.length - i), segment.seen + i, document, prompts, own)
        for i in range(0, segment.length, LINE)
    ]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: FlashKernel, spec: AttentionSpec) -> Tensor:
        call = kernel.job(q, k, v, spec, ("keys", "columns"))
        out = q.new_empty(q.shape)
        log_sums = torch.empty(len(kernel.blocks), q.shape[1], LINE)
        rest = torch.empty_like(out) if q.dtype == torch.bfloat16 else None
        call.bind(out=out, rest=rest, log_sums=log_sums)
        call.run("flash")
        ctx.save_for_backward(q, k, v, out, rest, log_sums)
        ctx.settings = kernel, spec
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, rest, log_sums = ctx.saved_tensors
        kernel, spec = ctx.settings
        call = kernel.job(q, k, v, spec, ("keys", "values", "columns"))
        found = [x.new_empty(x.shape) for x in (q, k, v)]
        call.bind(out=out, rest=rest, log_sums=log_sums, gradient=gradients[0].contiguous())
        call.bind(of_q=found[0], of_k=found[1], of_v=found[2])
        if kernel.in_parts:
            size = LINE * -(-q.shape[2] // LINE) * LINE
            call.bind(sums=torch.empty(len(kernel.blocks), q.shape[1], size))
            call.bind(turns=torch.zeros(len(kernel.blocks), k.shape[1], dtype=torch.long))
        call.run("flash_gradient")
        return *found, None, None
