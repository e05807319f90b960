"""ctypes structs of the arguments of `kernels.c`, and lists of kernel calls that run as one."""

import ctypes
from typing import Any

import numpy as np
import torch

from lockstep.model.ops.cpu.library import ALONE, loaded, run, team_size


def _fields(integers: str, addresses: str, floats: str = "") -> list[tuple[str, Any]]:
    kinds = (integers, ctypes.c_int64), (addresses, ctypes.c_void_p), (floats, ctypes.c_float)
    return [(name, kind) for names, kind in kinds for name in names.split()]


class AttentionJob(ctypes.Structure):
    """`struct attention`: paged attention of some rows, after their keys and values are written."""

    _fields_ = _fields(
        "written kept taken done joined writes rows parts heads groups width table_width q_stride k_stride v_stride "
        "tiled",
        "q k v keys values blocks offsets tokens sequences firsts lasts tables part_rows part_starts row_parts partial "
        "out",
        "scale cap",
    )


class NormJob(ctypes.Structure):
    """`struct norm`: RMSNorm over rows."""

    _fields_ = _fields("taken rows width", "x weight out", "eps")


class NormGradientJob(ctypes.Structure):
    """`struct norm_gradient`: gradients of RMSNorm."""

    _fields_ = _fields("taken rows width", "x weight gradient out of_weight", "eps")


class GateJob(ctypes.Structure):
    """`struct gate`: SwiGLU over rows."""

    _fields_ = _fields("taken rows width", "x out")


class GateGradientJob(ctypes.Structure):
    """`struct gate_gradient`: gradients of SwiGLU."""

    _fields_ = _fields("taken rows width", "x gradient out")


class LogitsGradientJob(ctypes.Structure):
    """`struct logits_gradient`: gradients of the logits of a softmax."""

    _fields_ = _fields("taken rows size stride", "logits targets log_sums at_target spread out", "scale")


class TransposedJob(ctypes.Structure):
    """`struct transposed`: a matrix with rows and columns exchanged."""

    _fields_ = _fields("taken rows columns stride", "x out")


class DrawJob(ctypes.Structure):
    """`struct draw`: sampling of one token for each row of logits."""

    _fields_ = _fields("taken rows size stride", "logits places scales shares tokens")


class LogSumsJob(ctypes.Structure):
    """`struct log_sums`: log-sum-exp over rows of logits."""

    _fields_ = _fields("taken rows size stride", "logits out", "scale")


class TurnJob(ctypes.Structure):
    """`struct turn`: rotary embedding of heads."""

    _fields_ = _fields("taken rows heads width stride out_stride", "x cosines sines out")


class ProductJob(ctypes.Structure):
    """`struct product`: x · weightᵀ + bias + add."""

    _fields_ = _fields("taken rows inputs outputs tiled packed", "x weight bias add out")


class _ListJob(ctypes.Structure):
    _fields_ = _fields("arrived count rows", "steps threads")


class JobList:
    """Kernel calls that run one after another in a single call from Python."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._library = loaded(dtype)
        self._dtype = dtype
        self._jobs: list[tuple[str, ctypes.Structure, AttentionJob | None]] = []
        self._steps: np.ndarray | None = None

    def add(self, name: str, job: ctypes.Structure, same: AttentionJob | None = None) -> None:
        """Append a kernel call.

        Args:
            same: for attention, what is copied into the job before each run: all but heads, arrays, scale and cap.
        """
        self._jobs.append((name, job, same))

    def run(self, rows: int) -> None:
        """Run all kernel calls on this number of rows."""
        if self._steps is None:
            steps = [
                [
                    ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value or 0,
                    ctypes.addressof(job),
                    0 if same is None else ctypes.addressof(same),
                ]
                for name, job, same in self._jobs
            ]
            self._steps = np.array(steps, np.int64)
        everything = _ListJob(count=len(self._jobs), rows=rows, steps=self._steps.ctypes.data, threads=team_size())
        self._library.begin(ctypes.byref(everything))
        run("list", everything, self._dtype, size=ALONE)
