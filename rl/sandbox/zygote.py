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
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from lockstep.rl.sandbox import libc
from lockstep.rl.sandbox.guest import exit_code, load, run_functions, run_whole
from lockstep.rl.sandbox.harness import examine, observe, read_tests
from lockstep.rl.sandbox.isolation import Isolation, SandboxLimits
from lockstep.rl.sandbox.jail import Jail, renew_folder
from lockstep.rl.sandbox.proxy import Start
from lockstep.rl.sandbox.wire import Channel

SHOWN = 4000
"""Characters of what a program printed that a pool is told, where it is only run."""

DONE, DEADLINE, STARVED = "done", "deadline", "starved"
"""What a pool is told: that the harness has ended, or that time was over before, used by the run or by others."""

_PROGRAM, _CHANNEL = 3, 4
"""Descriptors of a guest, after input, output and errors."""
_TESTS, _REPLY, _ZYGOTE = 3, 4, 5
"""Descriptors of a harness."""


class Zygote:
    """Judges items one at a time: forks a harness for each, and guests as the harness asks for them."""

    def __init__(self, control: socket.socket, uses: Isolation, limits: SandboxLimits) -> None:
        """`uses.namespaces` says whether this process is in namespaces already."""
        self._control, self._limits = control, limits
        self._jail = Jail(uses, limits)
        self._null = os.open(os.devnull, os.O_RDWR)
        self._itself = os.pidfd_open(os.getpid())
        libc.hide_memory()
        libc.adopt_orphans()

    def serve(self, refused: str = "") -> None:
        """Reports the active isolation and what the kernel refused, then judges until the pool closes its end."""
        self._control.send(json.dumps({"isolation": asdict(self._jail.active), "refused": refused}).encode())
        with suppress(_AbandonedError):
            while True:
                _, descriptors, _, _ = socket.recv_fds(self._control, 16, 3)
                if len(descriptors) != 3:
                    return
                self._control.send(self._judge(*descriptors).encode())

    def _judge(self, program: int, tests: int, reply: int) -> str:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = [self._null, self._null, self._null, tests, reply, theirs.fileno()]
        longest = self._limits.output_bytes
        harness = self._fork(lambda: _run_harness(longest), given, writes=False)
        for descriptor in (tests, reply, theirs.detach()):
            os.close(descriptor)
        item = _Item(self, program, harness, ours)
        try:
            return item.follow(self._limits.seconds, self._control)
        finally:
            item.end()
            self.clear(spared=set())

    def start(self, program: int, descriptors: list[int]) -> "_Child":
        """Forks a guest: one whose functions are called if it gets a channel, else one that reads and prints."""
        streams, channel = descriptors[:3], descriptors[3:]
        longest = self._limits.output_bytes
        life = (lambda: _serve_functions(longest)) if channel else (lambda: run_whole(load(_PROGRAM)))
        return self._fork(life, [*streams, program, *channel], writes=True)

    def _fork(self, life: Callable[[], int], descriptors: list[int], writes: bool) -> "_Child":
        """A child in the jail, the first process of a PID namespace of its own where there are namespaces."""
        apart = self._jail.active.namespaces
        if apart:
            libc.unshare(libc.NEW_PIDS)
        pid = os.fork()
        if pid == 0:
            self._be_child(life, descriptors, writes)
        if apart:
            libc.join(self._itself, libc.NEW_PIDS)
        return _Child(pid)

    def _be_child(self, life: Callable[[], int], descriptors: list[int], writes: bool) -> None:
        code = 70
        try:
            os.setsid()
            self._jail.enter(descriptors, writes)
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
            _kill_children(spared)


class _AbandonedError(Exception):
    """The pool is gone."""


def longest_run(seconds: float) -> float:
    """How long a run of so many seconds may last by the clock, where others have the processors."""
    return 10 * max(seconds, 1.0)


class Allowance:
    """The time limit of a run: so many seconds on a processor, and as many by the clock in which it does nothing.

    On a busy machine a run that takes 15 ms alone may get less than that in a second.
    """

    def __init__(self, seconds: float, now: float) -> None:
        self._seconds, self._most = seconds, longest_run(seconds)
        self._still = max(seconds, 1.0)  # many may have to have their turn before a run that wants to work does
        self._begun = self._changed = now
        self._used = 0.0
        self.end = now + seconds

    def over(self, used: float | None, now: float) -> str:
        """At `end`, or later: DEADLINE or STARVED; or nothing, and there is a new end.

        Args:
            used: seconds on a processor; None where they cannot be told, and all time is the run's.
        """
        if used is None or used >= self._seconds:
            return DEADLINE
        if used != self._used or now > self.end + self._still / 2:  # or the whole machine has stood still
            self._used, self._changed = used, now
        if now >= self._changed + self._still:
            return DEADLINE
        if now >= self._begun + self._most:
            return STARVED
        self.end = min(self._changed + self._still, self._begun + self._most, now + max(self._seconds - used, 0.01))
        return ""


class _Item:
    """The processes of the item in work."""

    def __init__(self, zygote: Zygote, program: int, harness: "_Child", requests: socket.socket) -> None:
        self._zygote, self._program = zygote, program
        self._harness, self._requests = harness, requests
        self._run: _Child | None = None
        self._runs = 0
        self._used_before = 0.0

    def follow(self, seconds: float, control: socket.socket) -> str:
        """Until the harness has ended; each run that it asks for has `seconds`, see `Allowance`."""
        time_left = Allowance(seconds, time.monotonic())
        while True:
            happened = self._wait(control, time_left.end)
            if not happened and (over := time_left.over(self._used(), time.monotonic())):
                return over if self._runs else DONE  # before the first run no program has had any of it
            if control.fileno() in happened:
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

    def _used(self) -> float | None:
        """Seconds that the run and its harness were on a processor; None where they may have started processes."""
        if not self._zygote.sees_all_work:
            return None
        return self._harness.used() - self._used_before + (self._run.used() if self._run else 0.0)

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
        self._used_before = self._harness.used()
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


class _Child:
    """A forked process; `ending` can be read when it has ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ending = os.pidfd_open(pid)

    def used(self) -> float:
        """Seconds that its threads were on a processor: the clock of clock_getcpuclockid(3)."""
        return time.clock_gettime(~self.pid << 3 | 2)

    def kill(self) -> None:
        """Ends it, and where it is the first process of a namespace all that it started."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.await_end()

    def await_end(self) -> str:
        """How it ended, empty for exit code 0."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.ending)
        if code < 0:
            return f"was ended by {_signal_name(-code)}"
        return f"ended with exit code {code}" if code else ""


def _signal_name(number: int) -> str:
    """As "SIGKILL"; most real-time signals have a number only."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _kill_children(spared: set[int]) -> None:
    """Without namespaces and seccomp: kills what this process has adopted, until nothing but the spared is left."""
    while found := set(_children()) - spared:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:  # a process may call itself any bytes
            parent = file.read().rpartition(b")")[2].split()[1]
            found += [int(name)] if int(parent) == os.getpid() else []
    return found


def _run_harness(longest: int) -> int:
    """Main function of a harness; returns its exit code."""
    start = _starter(socket.socket(fileno=_ZYGOTE))
    tests = read_tests(_TESTS)
    if isinstance(tests, str):
        seen = observe(tests, start, longest)
        said = [seen.output[:SHOWN], seen.problem]
    else:
        verdict = examine(tests, start, longest)
        said = [verdict.outcome, verdict.reason]
    os.write(_REPLY, json.dumps(said).encode())
    return 0


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


def _serve_functions(longest: int) -> int:
    """Main function of a guest whose functions are tested; returns its exit code."""
    run_functions(load(_PROGRAM), Channel(socket.socket(fileno=_CHANNEL), longest))
    return 0
