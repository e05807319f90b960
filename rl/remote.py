"""Calls of Ray's actors, each a process for one worker, and waiting for them.

An actor loads the class that works in it, and what that imports, in its own process only. `gather` waits for all and
fails with the first that fails, so that a dead worker never leaves the others waiting unnoticed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import ray

ENVIRONMENT = {
    # torch gives large tensors back to the kernel after each operation and faults them in again; a heap that is kept
    # halves the time of everything that is bound by memory.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
    "KINETO_LOG_LEVEL": "99",  # the profiler would print when it starts and stops
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What worker processes are started with."""

GRACE_S = 3.0
"""After the first failure, how long others may take to be heard."""


class WorkerFailed(RuntimeError):
    """A worker raised or died; the message begins with which."""


class WorkerDied(WorkerFailed):
    """A worker's process ended."""


@dataclass(frozen=True)
class ActorHandle:
    """An actor and its name in logs and errors."""

    name: str
    handle: Any

    def call(self, method: str, *args: Any, **named: Any) -> "Call":
        """A call of a method of its worker, to be gathered."""
        return self, self.handle.call.remote(method, *args, **named)

    def keep(self, method: str, *args: Any) -> "tuple[Call, Any]":
        """A call whose result stays where it is, for others; and where that is."""
        ended, result = self.handle.keep.remote(method, *args)
        return (self, ended), result

    def end(self) -> None:
        """End its process, if that has not happened."""
        ray.kill(self.handle)


Call = tuple[ActorHandle, Any]
"""Who was asked, and where the answer will be."""


Places = Sequence[Mapping[str, Any]]
"""Ray's options of each process of a role; with none, processes run anywhere and reserve nothing."""


def start(
    kind: Any, role: str, ranks: Iterable[int], threads: int, *args: Any, places: Places = (), together: int = 1
) -> list[ActorHandle]:
    """Actors with this many threads each, which work on so many calls at the same time."""
    environment = {"env_vars": ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}}
    started = []
    for rank in ranks:
        options = {"runtime_env": environment, "max_concurrency": together, **(places[rank] if places else {})}
        started.append(ActorHandle(f"{role} {rank}", kind.options(**options).remote(rank, *args)))
    return started


class Actor:
    """A process for a worker."""

    work: str
    """Module and class of the worker."""

    def __init__(self, rank: int, *args: Any) -> None:
        module, name = self.work.split(":")
        self._worker = getattr(import_module(module), name)(rank, *args)

    def call(self, method: str, *args: Any, **named: Any) -> Any:
        """What a method of the worker returns."""
        return getattr(self._worker, method)(*args, **named)

    @ray.method(num_returns=2)
    def keep(self, method: str, *args: Any) -> tuple[None, Any]:
        """As `call`, whose result is fetched by those alone who are given it."""
        return None, self.call(method, *args)

    def node(self) -> str:
        """Which of the cluster's hosts it runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def address(self) -> str:
        """Of this node."""
        return str(ray.util.get_node_ip_address())


def gather(calls: Sequence[Call]) -> list[Any]:
    """Results of calls in order, failing as soon as one of them fails.

    Raises:
        WorkerFailed: names the worker and carries its own error; `WorkerDied` where its process ended.
    """
    wait_for(calls)
    return [ray.get(call) for _, call in calls]


def any_of(calls: Sequence[Call], seconds: float | None = None) -> list[Call]:
    """Those that have ended, well or not; waits for the first, or so many seconds."""
    by_place = {call[1]: call for call in calls}
    ended = ray.wait(list(by_place), num_returns=1, timeout=seconds, fetch_local=False)[0]
    return [by_place[place] for place in ended]


def failed(call: Call) -> bool:
    """Whether a call that has ended did not end well."""
    return _error(call[1]) is not None


def wait_for(calls: Sequence[Call]) -> None:
    """As `gather`, but leaves the results where they are."""
    names = {call: member.name for member, call in calls}
    waiting = list(names)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, fetch_local=False)
        if all(_error(call) is None for call in done):
            continue
        # The peers of a worker that died fail, too, and may do so first: the death is the cause.
        more = ray.wait(waiting, num_returns=len(waiting), timeout=GRACE_S, fetch_local=False)[0] if waiting else []
        errors = {call: error for call in [*done, *more] if (error := _error(call)) is not None}
        cause = min(errors, key=lambda call: isinstance(errors[call], ray.exceptions.RayTaskError))
        words = re.sub("\x1b\\[[0-9;]*m", "", str(errors[cause]))  # Ray colours them wherever they go
        if isinstance(errors[cause], ray.exceptions.RayTaskError):
            raise WorkerFailed(f"{names[cause]}: {words}") from errors[cause]
        raise WorkerDied(f"{names[cause]} died: {words}") from errors[cause]


def _error(call: Any) -> Exception | None:
    try:
        ray.get(call)
    except ray.exceptions.RayError as error:
        return error
    return None
