"""A trace of a few steps: what one rank's CPU and accelerator did when, for Perfetto or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

FIRST, LAST = 3, 5
"""Steps that are traced, counted from 1: the first of all is unlike the others, and one more warms the profiler up."""


class Trace:
    """torch.profiler on this process, told by `step` where a step ends. Writes one file."""

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
        """A step has ended."""
        self._profiler.step()

    def close(self) -> bool:
        """End the trace, with what it saw of its steps; returns whether it saw any, and so there is a file."""
        self._profiler.stop()
        return self._path.exists()

    def _write(self, profiler: profile) -> None:
        if profiler.step_num < FIRST:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._path))
