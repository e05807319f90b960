"""Worlds of processes with pretended devices."""

import multiprocessing
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lockstep.distributed.world.rank_pool import Members, RankPool
from tests.pretended.device import compile_guard
from tests.pretended.process import serve


class PretendedPool(RankPool):
    """A `RankPool` whose processes have pretended devices, as many as there are ranks."""

    def __init__(self, devices: int, timeout_s: float = 120.0) -> None:
        """
        Args:
            devices: of the host.
        """
        super().__init__(timeout_s)
        self._folder = TemporaryDirectory()
        self._guard, self._devices = compile_guard(Path(self._folder.name)), devices

    def _started(self, size: int) -> Members:
        context = multiprocessing.get_context("spawn")
        members = self._members.setdefault(size, [])
        library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        while len(members) < size:
            ours, theirs = context.Pipe()
            what = (self._devices, str(self._guard), str(library), theirs)
            process = context.Process(target=serve, args=what, daemon=True)
            process.start()
            members.append((process, ours))
        return members
