"""The warm process that forks a sandbox's processes, enforces time limits and kills; it reads no program and no test.

Programs and tests lie in files that it hands on unread: a program's process is forked from its memory, where nothing of
a test may ever have been. For each item it forks a harness, which reads the tests and writes the verdict to the pool by
itself, and for each run that the harness asks for a guest, the process of the program. It has no threads, so that forks
are safe.
"""

import gc
import json
import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from lockstep.rl.sandbox import libraries
from lockstep.rl.sandbox.guest import exit_code, load, run_functions, run_whole
from lockstep.rl.sandbox.harness.examination import examine, read_tests
from lockstep.rl.sandbox.harness.runs import Runs, Start
from lockstep.rl.sandbox.harness.standard_streams import observe
from lockstep.rl.sandbox.isolation import SandboxLimits
from lockstep.rl.sandbox.linux import libc
from lockstep.rl.sandbox.linux.child import Child, kill_children
from lockstep.rl.sandbox.linux.jail import Jail, renew_folder
from lockstep.rl.sandbox.time_limit import Allowance, RequestClock, Spent, longest_run
from lockstep.rl.sandbox.wire import Channel

SHOWN = 4000
"""Characters of what a program printed that a pool is told, where it is only run."""

DONE = "done"
"""What a pool is told where the harness has ended, and time was not over before (see `time_limit`)."""

_LONGEST_LIST = 1 << 12
_JUST_BEGUN = 0.05
"""Seconds of an item in which nobody can have waited for long, so that nobody asks, which takes 0.5 ms."""
_PROGRAM, _CHANNEL = 3, 4
"""Descriptors of a guest, after input, output and errors."""
_TESTS, _REPLY, _ZYGOTE = 3, 4, 5
"""Descriptors of a harness."""


class Zygote:
    """Judges items one at a time: forks a harness for each, and guests as the harness asks for them."""

    def __init__(self, control: socket.socket, jail: Jail, limits: SandboxLimits, processes: int | None) -> None:
        """
        Args:
            processes: see `child.open_processes`.
        """
        self._control, self._jail, self._limits, self._processes = control, jail, limits, processes
        self.clock = RequestClock()
        self._null = os.open(os.devnull, os.O_RDWR)
        self._itself = os.pidfd_open(os.getpid())
        libc.hide_memory()
        libc.adopt_orphans()

    def serve(self, refused: str = "") -> None:
        """Reports the active isolation and what the kernel refused, then judges until the pool closes its end."""
        self._control.send(json.dumps({"isolation": asdict(self._jail.active), "refused": refused}).encode())
        with suppress(_AbandonedError):
            while True:
                wanted, descriptors, flags, _ = socket.recv_fds(self._control, _LONGEST_LIST, 3)
                if not wanted:
                    return
                if len(descriptors) != 3:
                    raise OSError(f"an item came with {len(descriptors)} of its 3 files (flags {flags:#x})")
                self._warm(wanted.decode().split()[1:])
                self._control.send(self._judge(*descriptors).encode())

    def _warm(self, names: list[str]) -> None:
        """Loads libraries once, where the first item comes that seems to need them."""
        if not all(name in sys.modules for name in names):
            libraries.warm(names)
            gc.collect()
            gc.freeze()

    def _judge(self, program: int, tests: int, reply: int) -> str:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [self._null, self._null, self._null, tests, reply, theirs.fileno()]
        self.clock.restart()
        harness = self._fork(self._run_harness, given, longest_run(self._limits.seconds), writes=False)
        for descriptor in (tests, reply, theirs.detach()):
            os.close(descriptor)
        item = _Item(self, program, harness, ours)
        try:
            return item.follow(self._limits.seconds, self._control)
        finally:
            item.end()
            self.clear(spared=set())

    def start(self, program: int, descriptors: list[int]) -> Child:
        """Forks a guest: one whose functions are called if it gets a channel, else one that reads and prints."""
        streams, channel = descriptors[:3], descriptors[3:]

        def life() -> int:
            self.clock.leave()
            if not channel:
                return run_whole(load(_PROGRAM))
            run_functions(load(_PROGRAM), Channel(socket.socket(fileno=_CHANNEL), self._limits.output_bytes))
            return 0

        return self._fork(life, [*streams, program, *channel], self._limits.seconds, writes=True)

    def _run_harness(self) -> int:
        """Life of a harness; returns its exit code."""
        runs = Runs(_starter(socket.socket(fileno=_ZYGOTE)), self.clock, self._limits.output_bytes)
        tests = read_tests(_TESTS)
        if isinstance(tests, str):
            seen = observe(tests, runs)
            said = [seen.output[:SHOWN], seen.problem]
        else:
            verdict = examine(tests, runs)
            said = [verdict.outcome, verdict.reason]
        os.write(_REPLY, json.dumps(said).encode())
        return 0

    def _fork(self, life: Callable[[], int], descriptors: list[int], seconds: float, writes: bool) -> Child:
        """A child in the jail, the first process of a PID namespace of its own where there are namespaces."""
        apart = self._jail.active.namespaces
        if apart:
            libc.unshare(libc.NEW_PIDS)
        pid = os.fork()
        if pid == 0:
            self._be_child(life, descriptors, seconds, writes)
        if apart:
            libc.join(self._itself, libc.NEW_PIDS)
        return Child(pid, self._processes)

    def _be_child(self, life: Callable[[], int], descriptors: list[int], seconds: float, writes: bool) -> None:
        code = 70
        try:
            os.setsid()
            self._jail.enter(descriptors, seconds, writes)
            gc.enable()
            code = life()
        except SystemExit as end:
            code = exit_code(end)
        except BaseException:
            traceback.print_exc(limit=-1)
            sys.stderr.flush()
        finally:
            os._exit(code)

    @property
    def sees_all_work(self) -> bool:
        """Whether the CPU clock of a guest counts all its work: it can start no other process."""
        return self._jail.active.seccomp

    def clear(self, spared: set[int]) -> None:
        """Removes what a run left: files, and processes but the spared."""
        if self._jail.active.namespaces:
            renew_folder(self._limits.folder_bytes)
        elif not self._jail.active.seccomp:
            kill_children(spared)


class _AbandonedError(Exception):
    """The pool is gone."""


class _Item:
    """The processes of the item in work."""

    def __init__(self, zygote: Zygote, program: int, harness: Child, requests: socket.socket) -> None:
        self._zygote, self._program = zygote, program
        self._harness, self._requests = harness, requests
        self._run: Child | None = None
        self._runs = 0
        self._begun = time.monotonic()
        self._before = Spent(0.0, 0.0, 0.0)

    def follow(self, seconds: float, control: socket.socket) -> str:
        """Until the harness has ended; each run that it asks for has `seconds`, see `Allowance`."""
        time_left = Allowance(seconds, time.monotonic())
        while True:
            happened = self._wait(control, time_left.end)
            if not happened and (over := time_left.over(self._spent(), time.monotonic())):
                return over
            if control.fileno() in happened:
                if control.recv(1, socket.MSG_PEEK):
                    raise RuntimeError("the pool sent an item before the verdict of the one in work")
                raise _AbandonedError
            if self._run and self._run.ending in happened:
                self._say(self._run.await_end())
            if self._requests.fileno() in happened:
                descriptors = self._requested()
                if not descriptors:
                    return DONE
                self._begin(descriptors)
                time_left = Allowance(seconds, time.monotonic())
            elif self._harness.ending in happened:
                return DONE

    def _wait(self, control: socket.socket, end: float) -> set[int]:
        """Descriptors that can be read, of which those of processes mean their end; none when time is over."""
        poll = select.poll()
        for descriptor in (control.fileno(), self._requests.fileno(), self._harness.ending):
            poll.register(descriptor, select.POLLIN)
        if self._run:
            poll.register(self._run.ending, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(max(0.0, end - time.monotonic()) * 1000)}

    def _spent(self) -> Spent:
        """What the run has spent so far."""
        now, before, run = self._spent_on_requests(), self._before, self._run
        elapsed, worked = now.elapsed - before.elapsed, now.worked - before.worked + (run.used() if run else 0.0)
        if not self._zygote.sees_all_work:
            worked = elapsed  # by processes of its own
        ours, its, earlier = now.waited, run.waited() if run else 0.0, before.waited
        waited = None if ours is None or its is None or earlier is None else ours + its - earlier
        return Spent(worked, waited, elapsed, now.huge)

    def _spent_on_requests(self) -> Spent:
        """What the requests of all runs have cost on the side of the harness."""
        now, used = time.monotonic(), self._harness.used()
        waited = self._harness.waited() if now > self._begun + _JUST_BEGUN else 0.0
        elapsed, worked, huge = self._zygote.clock.read(now, used)
        return Spent(worked, waited, elapsed, huge)

    def _requested(self) -> list[int]:
        """Descriptors for a run; none where the harness has ended, be it with a message that it did not read."""
        with suppress(ConnectionResetError):
            return list(socket.recv_fds(self._requests, 16, 4)[1])
        return []

    def _begin(self, descriptors: list[int]) -> None:
        if self._run:
            self._run.kill()
        self._zygote.clear(spared={self._harness.pid})
        self._run = self._zygote.start(self._program, descriptors)
        self._runs += 1
        self._before = self._spent_on_requests()
        for descriptor in descriptors:
            os.close(descriptor)

    def _say(self, how: str) -> None:
        self._run = None
        with suppress(OSError):
            self._requests.send(f"{self._runs} {how}".encode())

    def end(self) -> None:
        """Kills what is left, and closes what the item had."""
        for child in (self._run, self._harness):
            if child:
                child.kill()
        self._requests.close()
        os.close(self._program)


def _starter(requests: socket.socket) -> Start:
    """A function that asks the zygote for runs of the program, which it numbers."""
    runs = 0

    def start(descriptors: list[int]) -> Callable[[], str]:
        nonlocal runs
        runs += 1
        socket.send_fds(requests, [b"run"], descriptors)
        return lambda number=runs: _ended(requests, number)  # type: ignore[misc]

    return start


def _ended(requests: socket.socket, number: int) -> str:
    while True:
        run, _, how = requests.recv(256).decode().partition(" ")
        if run == str(number):
            return how
