"""A pool of local processes that run a function on every rank of a layout. Processes are reused between calls."""

import gc
import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from lockstep.distributed.device import keep_freed_memory
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import join, leave
from lockstep.distributed.world.meeting import host_meeting, meeting_at
from lockstep.distributed.world.network import LOOPBACK, use_interface_of

PRELOADED = ["lockstep.distributed.optimizer.zero"]
"""Modules that a process has from the start: imported once, in the server that all are forked from."""

MOST_THREADS = 100
"""Processes with more are replaced: a library may keep groups that were left, whose threads poll without pause."""

Members = list[tuple[Any, Connection]]


class WorldFailed(RuntimeError):
    """A rank raised, or did not answer; the message holds its traceback."""


class RankPool:
    """Processes on this machine, kept by world size: DeepSpeed keeps state of its world, so sizes do not mix."""

    def __init__(self, timeout_s: float = 120.0) -> None:
        """
        Args:
            timeout_s: how long any rank may be silent, in a call and in a collective.
        """
        self._members: dict[int, Members] = {}
        self._timeout_s = timeout_s

    def run(self, layout: Layout, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run function(groups, *args) on every rank; return the results by rank. `function` is defined at module level.

        Raises:
            WorldFailed: as soon as one rank does.
        """
        members = self._started(layout.processes)
        meeting = host_meeting(LOOPBACK)
        for rank, (_, pipe) in enumerate(members):
            pipe.send((layout, rank, meeting.port, self._timeout_s, function, args))
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(members)}
        answers: dict[int, Any] = {}
        spent = False
        while len(answers) < len(members):
            waiting = [pipe for pipe, rank in ranks.items() if rank not in answers]
            ready: list[Any] = [*multiprocessing.connection.wait(waiting, timeout=self._timeout_s)] or [None]
            for pipe in ready:
                silence = f"no answer from {len(waiting)} ranks in {self._timeout_s} s"
                ok, value, threads = pipe.recv() if pipe else (False, silence, 0)
                spent |= threads > MOST_THREADS
                if not ok:  # the others may wait for the rank that raised, for ever
                    self._end(layout.processes)
                    raise WorldFailed(value)
                answers[ranks[pipe]] = value
        if spent:
            self._end(layout.processes)
        return [answers[rank] for rank in range(len(members))]

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for size in list(self._members):
            self._end(size)

    def _end(self, size: int) -> None:
        for process, pipe in self._members.pop(size):
            pipe.close()
            process.kill()
            process.join()

    def _started(self, size: int) -> Members:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        members = self._members.setdefault(size, [])
        while len(members) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            members.append((process, ours))
        return members


def _serve(pipe: Connection) -> None:
    keep_freed_memory()
    use_interface_of(LOOPBACK)
    torch.set_num_threads(1)
    while True:
        try:
            layout, rank, port, timeout_s, function, args = pipe.recv()
        except EOFError:
            return
        if not gc.get_freeze_count():
            gc.freeze()  # the libraries, imported by now: each world that is left looks for garbage
        try:
            groups = join(layout, rank=rank, meeting=meeting_at(LOOPBACK, port), timeout_s=timeout_s)
            ok, value = True, function(groups, *args)
            torch.distributed.barrier()
            del groups
            leave()
        except Exception:
            ok, value = False, f"rank {rank}: {traceback.format_exc()}"
        pipe.send((ok, value, len(os.listdir("/proc/self/task"))))
