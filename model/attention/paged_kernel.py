"""The CPU kernel of paged attention, which reads keys and values in their blocks without gathering them.

A sequence is attended to in parts of a fixed length, which are then combined in order. So a token's result depends on
its query and on what it sees at which positions: not on the batch, the chunking of its sequence or the threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lockstep.model.attention.spec import AttentionSpec
from lockstep.model.ops.cpu import jobs, kernels, library

BLOCK = 16
"""Tokens of a block, as in `kernels.c`."""

PART = 512
"""Tokens of a sequence that one thread attends to at a time, as in `kernels.c`."""

ROWS = 128
"""Tokens that attend in one call: the sums of their parts exist at the same time."""


def serves(dtype: torch.dtype, device: torch.device, width: int) -> bool:
    """Whether the kernel can be used for heads of this width, dtype and device."""
    return kernels.usable(dtype, device) and width % 2 == 0


def pair_of(dtype: torch.dtype, width: int) -> int:
    """How many elements are interleaved in a block (of a key's width, of a value's tokens): 2 of 16 bits, else 1."""
    return 2 if dtype.itemsize == 2 and width % 2 == 0 else 1


def first_seen(position: int, window: int | None) -> int:
    """Index of the first block that a token at a position sees, given its window."""
    return 0 if window is None else max(0, position - window + 1) // BLOCK


def block_shapes(dtype: torch.dtype, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one head's keys and values in a block."""
    pair = pair_of(dtype, width)
    return (width // pair, BLOCK, pair), (BLOCK // pair, width, pair)


@dataclass(frozen=True)
class Rows:
    """R tokens (queries) that attend, with their sequences' block tables."""

    tokens_R: np.ndarray
    """Their indices in the pass."""
    sequences_R: np.ndarray
    """Their rows of `tables_SP`."""
    positions_R: np.ndarray
    """Each sees the keys up to there."""
    tables_SP: np.ndarray
    """The block table of each sequence, from position 0 on; any number for blocks that no row sees."""

    def part(self, start: int) -> "Rows":
        """`ROWS` of them from `start` on, or as many as are left."""
        here = slice(start, start + ROWS)
        return Rows(self.tokens_R[here], self.sequences_R[here], self.positions_R[here], self.tables_SP)


class PagedKernel:
    """Writes the keys and values of a pass into blocks, then attends for some of its tokens."""

    def __init__(
        self,
        places: tuple[np.ndarray, np.ndarray],
        rows: Rows,
        window: int | None,
        *,
        groups: int,
        width: int,
        tiled: bool = False,
    ) -> None:
        """
        Args:
            places: the block, and the offset in it, of each key and value of the pass.
            groups: number of key-value heads.
            tiled: use the processor's matrix tiles (AMX), with probabilities rounded to the dtype of the values.
        """
        self._places = [np.ascontiguousarray(x, np.int32) for x in places]
        starts = range(0, max(len(rows.tokens_R), 1), ROWS)
        self._calls = [_Call(rows.part(start), window, groups, width, tiled) for start in starts]
        first = self._calls[0].job
        first.writes, (first.blocks, first.offsets) = len(places[0]), (x.ctypes.data for x in self._places)
        self._partial: np.ndarray | None = None

    def __call__(
        self, keys: Tensor, values: Tensor, q_THE: Tensor, k_KGE: Tensor, v_KGE: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Attention [T, H, E]; undefined for tokens that are not among the rows.

        Args:
            keys: [blocks, G, …] of `block_shapes`; values alike.
            k_KGE: keys to write at `places` before anything attends; values alike.
        """
        q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q_THE, k_KGE, v_KGE))
        mixed = q.new_empty(q.shape)
        for job, call in zip(self.jobs(q.shape[1]), self._calls, strict=True):
            job.written = job.kept = job.taken = job.done = job.joined = 0
            job.q, job.k, job.v, job.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), mixed.data_ptr()
            job.q_stride, job.k_stride, job.v_stride = q.stride(0), k.stride(0), v.stride(0)
            job.keys, job.values = keys.data_ptr(), values.data_ptr()
            job.scale = q.shape[2] ** -0.5 if spec.scale is None else spec.scale
            job.cap = spec.cap or 0.0
            library.run("attention", job, q.dtype, size=call.size)
        return mixed

    def jobs(self, heads: int) -> Sequence[jobs.AttentionJob]:
        """The C structs of this attention, one for each `ROWS` tokens; layers differ in their pointers only."""
        jobs = [call.job for call in self._calls]
        if self._partial is None:
            self._partial = np.empty((max(job.parts for job in jobs), heads, jobs[0].width + 2), np.float32)
            for job in jobs:
                job.partial, job.heads = self._partial.ctypes.data, heads
        return jobs


class _Call:
    """One call of the kernel, and the arrays that it reads."""

    def __init__(self, rows: Rows, window: int | None, groups: int, width: int, tiled: bool) -> None:
        lasts = rows.positions_R
        firsts = np.zeros_like(lasts) if window is None else np.maximum(lasts - (window - 1), 0)
        counts = lasts // PART - firsts // PART + 1
        of_part = np.repeat(np.arange(len(lasts)), counts)
        starts = np.cumsum(counts) - counts
        arrays = {
            "tokens": rows.tokens_R,
            "sequences": rows.sequences_R,
            "tables": rows.tables_SP,
            "firsts": firsts,
            "lasts": lasts,
            "part_rows": of_part,
            "part_starts": (firsts[of_part] // PART + np.arange(len(of_part)) - starts[of_part]) * PART,
            "row_parts": np.append(starts, len(of_part)),
        }
        self._arrays = {name: np.ascontiguousarray(array, np.int32) for name, array in arrays.items()}
        self.size = int((lasts - firsts + 1).sum()) * groups * width
        self.job = jobs.AttentionJob(
            rows=len(lasts),
            parts=len(of_part),
            groups=groups,
            width=width,
            table_width=rows.tables_SP.shape[1],
            tiled=tiled,
            **{name: array.ctypes.data for name, array in self._arrays.items()},
        )
