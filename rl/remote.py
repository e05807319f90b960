"""Typed calls of Ray actors, each a process for one worker, and waiting for their results.

`worker.call(ModelWorker.update, …)` is checked by mypy against the method's own signature. An actor imports the class
that works in it, and what that imports, in its own process only; the driver names it by `lockstep.rl.workers.stubs`, or
by a protocol. `gather` waits for all calls and fails with the first that fails, so that a dead worker never leaves the
others waiting unnoticed.
"""

import os
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from inspect import isawaitable
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, overload

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lockstep.rl.cores import threads_for

JEMALLOC = Path(ray.__file__).parent / "core" / "libjemalloc.so"
"""The allocator that Ray's wheels for Linux bring along, for its own processes."""

ENVIRONMENT = {
    # torch gives large tensors back to the kernel after each operation and faults them in again; a heap that is kept
    # halves the time of everything that is bound by memory. jemalloc keeps small blocks apart from large ones, which
    # then find a place among those that were freed, and takes huge pages. A block may be cut from a freed one of any
    # size; by default of up to 64 times its own, and the heap grows beside gigabytes that are free. What the driver
    # preloads takes its place.
    **({"LD_PRELOAD": os.environ.get("LD_PRELOAD") or str(JEMALLOC)} if JEMALLOC.is_file() else {}),
    "MALLOC_CONF": ",".join(
        (
            "narenas:1",
            "oversize_threshold:0",
            "dirty_decay_ms:-1",
            "muzzy_decay_ms:-1",
            "lg_extent_max_active_fit:63",
            "thp:always",
        )
    ),
    # glibc's own, where there is no jemalloc
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # who reserves no device keeps those that it is given, or sees all
    "KINETO_LOG_LEVEL": "99",  # the profiler would print when it starts and stops
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables that worker processes are started with."""

PASSED_ON = "LOCKSTEP_PASSED_ON"
"""Names of variables of the driver, with commas between them, that workers get as well. They travel as arguments: Ray
writes the variables of a runtime environment into its logs."""

GRACE_S = 3.0
"""Seconds that other calls get to end after the first failure, so that its cause is among those that are compared."""

Worker = TypeVar("Worker", covariant=True)
Result = TypeVar("Result")
Answer = TypeVar("Answer", covariant=True)
Params = ParamSpec("Params")


class WorkerFailed(RuntimeError):
    """A worker raised or died; the message begins with which."""


class WorkerDied(WorkerFailed):
    """A worker's process ended."""


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """A call of an actor's method, which may still run; `gather` waits for it and returns its result."""

    actor: "ActorHandle[Any]"
    ref: Any
    """Ray's reference to the result."""


@dataclass(frozen=True)
class StoredCall(Generic[Answer]):
    """A call whose result stays in Ray's object store, for other workers to read."""

    ended: Call[None]
    value: Answer
    """Ray's reference to the result. It is typed as the result because Ray replaces it by that where it is an argument
    of another call, which is all that it may be used for."""


@dataclass(eq=False)
class ActorHandle(Generic[Worker]):
    """An actor and its name in logs and errors."""

    name: str
    handle: Any
    located: Any = None
    """Ray's reference to its node and process, asked for before anything else, so that no work delays the answer."""
    end_reason: str = ""
    """Why its process was ended, where that was decided here."""
    _place: tuple[str, int] | None = field(default=None, init=False, repr=False)

    @property
    def role(self) -> str:
        """Its name without its number."""
        return self.name.rpartition(" ")[0]

    @overload
    def call(
        self,
        method: Callable[Concatenate[Worker, Params], Coroutine[Any, Any, Result]],
        *args: Params.args,
        **named: Params.kwargs,
    ) -> Call[Result]: ...
    @overload
    def call(
        self, method: Callable[Concatenate[Worker, Params], Result], *args: Params.args, **named: Params.kwargs
    ) -> Call[Result]: ...
    def call(self, method: Callable[..., Any], *args: Any, **named: Any) -> Call[Any]:
        """Calls a method of the actor's worker, without waiting for its result."""
        return Call(self, self.handle.call.remote(method.__name__, *args, **named))

    def store(
        self, method: Callable[Concatenate[Worker, Params], Result], *args: Params.args, **named: Params.kwargs
    ) -> StoredCall[Result]:
        """Calls a method whose result is read by other workers only."""
        ended, value = self.handle.store.remote(method.__name__, *args, **named)
        return StoredCall(Call(self, ended), cast(Result, value))

    def address(self) -> Call[str]:
        """Asks for the IP address of the host that the actor runs on."""
        return Call(self, self.handle.address.remote())

    def place(self) -> "Call[tuple[str, int]]":
        """The call that ends when the actor has a place and a worker: Ray's ID of its node, and process ID."""
        return Call(self, self.located)

    def known_place(self) -> tuple[str, int] | None:
        """The result of `place`, if it has come; Ray is asked for it until it has."""
        if self._place is None and self.located is not None and ray.wait([self.located], timeout=0)[0]:
            self._place = None if failed(self.place()) else ray.get(self.located)
        return self._place

    def end(self) -> None:
        """Kills the actor's process, if it lives."""
        ray.kill(self.handle)


@dataclass(frozen=True)
class Place:
    """Where a process runs, and what it finds there."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Ray's options; with none, it runs anywhere and reserves nothing."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables, beside those that all processes have."""
    sharing: int = 1
    """Processes that compute on its host while it does, itself among them: they share the cores."""


Places = Sequence[Place]
"""The place of each process of a role; with none, as `Place()` says."""


@dataclass(frozen=True)
class Processes:
    """The processes of a role: how many, and what each is started with."""

    role: str
    ranks: Iterable[int]
    threads: int | None = None
    """OpenMP threads of each; None for its part of the cores that its host lets it use."""
    places: Places = ()
    together: int = 1
    """Calls that each works on at the same time."""
    event_loop: bool = False
    """Whether methods may be coroutine functions."""
    variables: Sequence[str] = ()
    """Names of variables of the driver that they get, beside those of `PASSED_ON` and in the same way."""
    python: str = ""
    """The interpreter that runs them, with what its environment has; empty for that of the cluster."""


def start(
    kind: Callable[Concatenate[int, Params], Worker],
    processes: Processes,
    *args: Params.args,
    **named: Params.kwargs,
) -> list[ActorHandle[Worker]]:
    """Starts actors, each of which makes a worker of this class from its rank and the arguments."""
    actor = type(kind.__name__, (_AsyncActor if processes.event_loop else _Actor,), {})  # the name is in process titles
    made: Any = ray.remote(max_restarts=0, num_cpus=0)(actor)
    names = (*os.environ.get(PASSED_ON, "").split(","), *processes.variables)
    passed_on = {name: os.environ[name] for name in names if name in os.environ}
    started = []
    for rank in processes.ranks:
        place = processes.places[rank] if processes.places else Place()
        inside: dict[str, Any] = {"env_vars": {**ENVIRONMENT, **place.variables}}
        if processes.python:
            inside["py_executable"] = processes.python
        options = {"runtime_env": inside, "max_concurrency": processes.together, **place.options}
        cores = processes.threads, place.sharing
        handle = made.options(**options).remote(passed_on, cores, kind.__module__, kind.__name__, rank, *args, **named)
        started.append(ActorHandle[Worker](f"{processes.role} {rank}", handle, handle.place.remote()))
    return started


class _Actor:
    """A process for a worker."""

    def __init__(
        self,
        passed_on: Mapping[str, str],
        cores: tuple[int | None, int],
        module: str,
        name: str,
        rank: int,
        *args: Any,
        **named: Any,
    ) -> None:
        os.environ.update(passed_on)
        threads, sharing = cores
        os.environ["OMP_NUM_THREADS"] = str(threads or threads_for(sharing))  # which importing a worker reads
        self._worker = getattr(import_module(module), name)(rank, *args, **named)

    def call(self, method: str, *args: Any, **named: Any) -> Any:
        return getattr(self._worker, method)(*args, **named)

    @ray.method(num_returns=2)
    def store(self, method: str, *args: Any, **named: Any) -> tuple[None, Any]:
        return None, self.call(method, *args, **named)

    def place(self) -> tuple[str, int]:
        return str(ray.get_runtime_context().get_node_id()), os.getpid()

    def address(self) -> str:
        return str(ray.util.get_node_ip_address())


class _AsyncActor(_Actor):
    """A process for a worker whose methods may be coroutine functions."""

    async def call(self, method: str, *args: Any, **named: Any) -> Any:
        found = getattr(self._worker, method)(*args, **named)
        return await found if isawaitable(found) else found


def on_node(
    node: str, function: Callable[Params, Result], *args: Params.args, **named: Params.kwargs
) -> "ray.ObjectRef[Result]":
    """Starts a function on the node of this ID alone, in a process that reserves nothing; returns Ray's reference."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    started: ray.ObjectRef[Result] = _task(function).options(scheduling_strategy=there).remote(*args, **named)
    return started


@cache
def _task(function: Callable[..., Any]) -> Any:
    """A function as Ray's task, made once: the head keeps each that is made for as long as it lives."""
    return ray.remote(num_cpus=0, max_retries=0)(function)


def put(value: Result) -> Result:
    """Stores a value in Ray's object store, once for all calls that it is an argument of, and in a host's memory once.

    What is returned is Ray's reference, typed as the value because Ray replaces it by that in calls.
    """
    return cast(Result, ray.put(value))


class Gather(Protocol):
    """A function that waits for calls as `gather` does; it may do something else meanwhile."""

    def __call__(self, calls: Sequence[Call[Result]], /) -> list[Result]:
        """See `gather`."""


def gather(calls: Sequence[Call[Result]]) -> list[Result]:
    """Results of calls in order, failing as soon as one of them fails.

    Raises:
        WorkerFailed: names the worker and carries its own error; `WorkerDied` where its process ended.
    """
    wait_for(calls)
    return [ray.get(call.ref) for call in calls]


def any_of(calls: Sequence[Call[Any]], seconds: float | None = None) -> list[Call[Any]]:
    """Calls that have ended, well or not; waits for the first, or for so many seconds."""
    by_ref = {call.ref: call for call in calls}
    if not by_ref:
        time.sleep(seconds or 0.0)
        return []
    ended = ray.wait(list(by_ref), num_returns=1, timeout=seconds, fetch_local=False)[0]
    return [by_ref[ref] for ref in ended]


def have_ended(calls: Sequence[Call[Any]]) -> bool:
    """Whether all calls have ended, or one of them has failed, so that `gather` does not wait for long."""
    refs = [call.ref for call in calls]
    ended = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0]
    return len(ended) == len(refs) or any(_error(ref) for ref in ended)


def failed(call: Call[Any]) -> bool:
    """Whether a call that has ended raised, or its actor died."""
    return _error(call.ref) is not None


def wait_for(calls: Sequence[Call[Any]]) -> None:
    """Waits as `gather` does, but leaves the results where they are."""
    actors = {call.ref: call.actor for call in calls}
    waiting = list(actors)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, fetch_local=False)
        if all(_error(ref) is None for ref in done):
            continue
        # The peers of a worker that died fail, too, and may do so first: the death is the cause.
        more = ray.wait(waiting, num_returns=len(waiting), timeout=GRACE_S, fetch_local=False)[0] if waiting else []
        errors = {ref: error for ref in [*done, *more] if (error := _error(ref)) is not None}
        cause = min(errors, key=lambda ref: isinstance(errors[ref], ray.exceptions.RayTaskError))
        name, words = actors[cause].name, re.sub("\x1b\\[[0-9;]*m", "", str(errors[cause]))  # without Ray's colours
        if isinstance(errors[cause], ray.exceptions.RayTaskError):
            raise WorkerFailed(f"{name}: {words}") from errors[cause]
        raise WorkerDied(f"{name} died: {actors[cause].end_reason or words}") from errors[cause]


def _error(ref: Any) -> Exception | None:
    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        return error
    return None
