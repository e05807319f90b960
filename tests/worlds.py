"""Real gloo worlds for tests: processes that are started once and form a new world for each call."""

import multiprocessing
import multiprocessing.connection
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from lockstep.distributed.layout import Layout

TIMEOUT_S = 120

Members = list[tuple[Any, Connection]]


class Worlds:
    """Processes for worlds of each size; DeepSpeed keeps state of its world, so sizes do not mix in one process."""

    def __init__(self) -> None:
        self._members: dict[int, Members] = {}

    def run(self, layout: Layout, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of function(groups, *args) on every rank; `function` stands at the top of a module."""
        members = self._started(layout.processes)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank, (_, pipe) in enumerate(members):
            pipe.send((layout, rank, port, function, args))
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(members)}
        answers: dict[int, Any] = {}
        while len(answers) < len(members):
            waiting = [pipe for pipe, rank in ranks.items() if rank not in answers]
            for pipe in multiprocessing.connection.wait(waiting, timeout=TIMEOUT_S) or [None]:
                ok, value = pipe.recv() if pipe else (False, f"no answer from {len(waiting)} ranks in {TIMEOUT_S} s")
                if not ok:  # the others may wait for the rank that raised, for ever
                    self._end(layout.processes)
                    raise AssertionError(value)
                answers[ranks[pipe]] = value
        return [answers[rank] for rank in range(len(members))]

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
        context = multiprocessing.get_context("spawn")
        members = self._members.setdefault(size, [])
        while len(members) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            members.append((process, ours))
        return members


def _serve(pipe: Connection) -> None:
    import torch

    from lockstep.distributed.groups import join, leave

    torch.set_num_threads(1)
    while True:
        try:
            layout, rank, port, function, args = pipe.recv()
        except EOFError:
            return
        try:
            groups = join(layout, rank=rank, address="127.0.0.1", port=port, timeout_s=120)
            answer = (True, function(groups, *args))
            torch.distributed.barrier()
            leave()
        except Exception:
            answer = (False, f"rank {rank}: {traceback.format_exc()}")
        pipe.send(answer)
