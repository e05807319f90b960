"""torch.profiler traces of a few steps on one rank, for Perfetto or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

FIRST, LAST = 3, 5
"""Steps that are traced, counted from 1: the first of all is unlike the others, and one more warms the profiler up."""


class Trace:
    """A torch.profiler of this process that traces steps FIRST to LAST and writes one file."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: of the .json file in Chrome's trace event format, written after step LAST.
        """
        self._path = path
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=schedule(wait=FIRST - 2, warmup=1, active=LAST - FIRST + 1, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def step(self) -> None:
        """Tell the profiler that a step has ended."""
        self._profiler.step()

    def close(self) -> bool:
        """Stop profiling; returns whether a trace file was written, which needs at least one traced step."""
        self._profiler.stop()
        return self._path.exists()

    def _write(self, profiler: profile) -> None:
        if profiler.step_num < FIRST:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._path))
