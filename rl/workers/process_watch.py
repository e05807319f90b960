"""Ends workers whose processes have been stopped for too long, so that they count as dead, and finds who is gone.

What a process's kernel says of it decides: state T of /proc/PID/stat, in which a signal such as SIGSTOP puts a process
and in which none of its threads runs. A worker that works is never in that state, however long its step and whatever
holds the interpreter's lock; nor is one that waits for a peer, or at a debugger's breakpoint (state t). A short-lived
task of Ray on the worker's node reads it, so that the answer does not depend on the worker, or on who asks.
"""

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self, TypeVar

import ray

from lockstep.rl.remote import ActorHandle, WorkerDied, WorkerFailed, on_node

LOOKS = 10
"""How often processes are looked at within the time that they may be stopped."""
ANSWER_S = 20.0
"""Seconds that a node gets to answer. One that does not is no evidence: Ray itself finds nodes that are lost."""
STOPPED = "T"

Given = TypeVar("Given")
Found = TypeVar("Found")


@dataclass(frozen=True)
class ProcessState:
    """What the kernel says of a process."""

    letter: str
    """R, S, D, T and so on, as in proc(5)."""
    ticks: int
    """Processor time that all of its threads have used."""


_Places = dict[ActorHandle[Any], tuple[str, int]]
"""Node and process of workers."""


def process_state(pid: int) -> ProcessState | None:
    """State of a process of this machine; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else ProcessState(fields[0], int(fields[11]) + int(fields[12]))


def process_states(pids: Sequence[int]) -> dict[int, ProcessState | None]:
    """State of each of these processes of this machine."""
    return {pid: process_state(pid) for pid in pids}


def end_stopped(pid: int) -> bool:
    """Kills a process of this machine if it is stopped; returns whether it was."""
    state = process_state(pid)
    if state is None or state.letter != STOPPED:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return True


class StoppedProcesses:
    """Since when processes have been stopped, by what is seen of them now and then."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[float, int]] = {}

    def seconds(self, now: float, states: Mapping[Any, ProcessState | None]) -> dict[Any, float]:
        """Seconds for which each process that is stopped has been so at every look, and used no processor time.

        Args:
            states: by anything that names a process; those that are left out are forgotten.
        """
        stopped = {who: state.ticks for who, state in states.items() if state and state.letter == STOPPED}
        before = self._seen
        self._seen = {
            who: (before[who][0] if who in before and before[who][1] == ticks else now, ticks)
            for who, ticks in stopped.items()
        }
        return {who: now - since for who, (since, _) in self._seen.items()}


class ProcessWatch:
    """Looks after the processes of workers within a block, from a thread of its own."""

    def __init__(
        self, workers: Callable[[], Iterable[ActorHandle[Any]]], stopped_after: float, say: Callable[[str], object]
    ) -> None:
        """
        Args:
            workers: all that work at present.
            stopped_after: seconds for which a process may be stopped.
            say: takes a sentence on each that is ended.
        """
        self._workers, self._limit, self._say = workers, stopped_after, say
        self._stopped, self._over = StoppedProcesses(), Event()
        self._thread = Thread(target=self._run, daemon=True, name="process watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Ends the watch. After an error of a worker all are ended, and one that is gone is named as its cause.

        Raises:
            WorkerDied: in the place of an error whose cause is that a worker is gone.
        """
        self._over.set()
        self._thread.join()
        if not isinstance(error, WorkerFailed):
            return
        loss = self._loss_behind(error)
        for worker in self._workers():
            worker.end()
        if loss:
            raise WorkerDied(loss) from error

    def _run(self) -> None:
        while not self._over.wait(self._limit / LOOKS):
            self._look()

    def _look(self) -> None:
        """Ends the processes that have been stopped for too long."""
        places = self._places()
        seconds = self._stopped.seconds(time.monotonic(), _states(places))
        for worker in (worker for worker in places if seconds.get(worker, 0.0) >= self._limit):
            node, pid = places[worker]
            reason = f"its process {pid} was stopped by a signal for {seconds[worker]:.0f} s, and was ended for that"
            worker.end_reason = reason
            if _ask_nodes(end_stopped, {node: pid}).get(node):
                self._say(f"{worker.name} counts as dead: {reason}")
            else:
                worker.end_reason = ""

    def _places(self) -> _Places:
        return {worker: place for worker in self._workers() if (place := worker.known_place())}

    def _loss_behind(self, error: WorkerFailed) -> str | None:
        """Which worker of the same role as the one that failed is gone, where that is why it failed and Ray said not.

        Peers of a rank that died raise errors of their own, which may come before Ray knows of the death.
        """
        if isinstance(error, WorkerDied) and not isinstance(error.__cause__, ray.exceptions.ActorUnavailableError):
            return None
        end = time.monotonic() + ANSWER_S
        while True:
            places = {who: place for who, place in self._places().items() if str(error).startswith(who.role)}
            lost = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]}
            states = _states({who: place for who, place in places.items() if place[0] not in lost})
            for worker, (node, _) in places.items():
                if node in lost:
                    return f"{worker.name} died: its node {lost[node]} is lost"
                if worker in states and states[worker] is None:
                    return f"{worker.name} died: its process is gone"
            if states.keys() == places.keys() or time.monotonic() > end:
                return None


def _states(places: _Places) -> dict[ActorHandle[Any], ProcessState | None]:
    """States of processes, those of nodes that do not answer left out."""
    pids = defaultdict[str, list[int]](list)
    for node, pid in places.values():
        pids[node].append(pid)
    found = _ask_nodes(process_states, pids)
    return {worker: found[node][pid] for worker, (node, pid) in places.items() if node in found}


def _ask_nodes(function: Callable[[Given], Found], given: Mapping[str, Given]) -> dict[str, Found]:
    """Results of a function that runs on several nodes at the same time, of those that answer."""
    nodes = {on_node(node, function, argument): node for node, argument in given.items()}
    if not nodes:
        return {}
    ended, late = ray.wait(list(nodes), num_returns=len(nodes), timeout=ANSWER_S)
    for ref in late:
        ray.cancel(ref)
    found = {}
    for ref in ended:
        with suppress(ray.exceptions.RayError):  # its node is lost
            found[nodes[ref]] = ray.get(ref)
    return found
