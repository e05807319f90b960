"""The process between a pool and the programs: it forks, keeps time and kills, and reads nothing.

Programs and tests lie in files that it hands on unread: a program's process is forked from its memory, where nothing of
a test may ever have been. For each item it forks an examiner, which reads the tests and writes the verdict to the pool
by itself, and for each run that the examiner asks for a process for the program. It has no threads, so that a fork is
whole.
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

from lockstep.rl.sandbox import syscalls
from lockstep.rl.sandbox.guest import exit_code, load, run_functions, run_whole
from lockstep.rl.sandbox.harness import examine, observe, read_tests
from lockstep.rl.sandbox.isolation import Isolation, SandboxLimits
from lockstep.rl.sandbox.jail import Jail, renew_folder
from lockstep.rl.sandbox.proxy import Start
from lockstep.rl.sandbox.wire import Channel

SHOWN = 4000
"""Characters of what a program printed that a pool is told, where it is only run."""

DONE, DEADLINE, STARVED = "done", "deadline", "starved"
"""What a pool is told: that the examiner has ended, or that time was over before, used by the run or by others."""

_PROGRAM, _CHANNEL = 3, 4
"""Descriptors of a program's process, after input, output and errors."""
_TESTS, _REPLY, _KEEPER = 3, 4, 5
"""Descriptors of an examiner's process."""


class Zygote:
    """The loop over items, one at a time."""

    def __init__(self, control: socket.socket, uses: Isolation, limits: SandboxLimits) -> None:
        """Of `uses`, the namespaces stand around this process already, or do not."""
        self._control, self._limits = control, limits
        self._walls = Jail(uses, limits)
        self._null = os.open(os.devnull, os.O_RDWR)
        self._itself = os.pidfd_open(os.getpid())
        syscalls.hide_memory()
        syscalls.adopt_orphans()

    def keep(self, refused: str = "") -> None:
        """Says which walls stand and what the kernel refused, then judges until the pool closes its end."""
        self._control.send(json.dumps({"protection": asdict(self._walls.stand), "refused": refused}).encode())
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
        examiner = self._fork(lambda: _examine(longest), given, writes=False)
        for descriptor in (tests, reply, theirs.detach()):
            os.close(descriptor)
        item = _Item(self, program, examiner, ours)
        try:
            return item.follow(self._limits.seconds, self._control)
        finally:
            item.end()
            self.clear(spared=set())

    def start(self, program: int, descriptors: list[int]) -> "_Child":
        """A process for the program, of functions if it gets a channel, else of input and output."""
        streams, channel = descriptors[:3], descriptors[3:]
        longest = self._limits.output_bytes
        life = (lambda: _serve_functions(longest)) if channel else (lambda: run_whole(load(_PROGRAM)))
        return self._fork(life, [*streams, program, *channel], writes=True)

    def _fork(self, life: Callable[[], int], descriptors: list[int], writes: bool) -> "_Child":
        """A child that is the first process of a namespace of its own, behind all walls."""
        apart = self._walls.stand.namespaces
        if apart:
            syscalls.unshare(syscalls.NEW_PIDS)
        pid = os.fork()
        if pid == 0:
            self._be_child(life, descriptors, writes)
        if apart:
            syscalls.join(self._itself, syscalls.NEW_PIDS)
        return _Child(pid)

    def _be_child(self, life: Callable[[], int], descriptors: list[int], writes: bool) -> None:
        code = 70
        try:
            os.setsid()
            self._walls.put_on(descriptors, writes)
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
        """Whether the clock of a program's process is that of all its work: it can start no other."""
        return self._walls.stand.seccomp

    def clear(self, spared: set[int]) -> None:
        """Nothing of a run stays for the next, neither files nor processes but the spared."""
        if self._walls.stand.namespaces:
            renew_folder(self._limits.folder_bytes)
        elif not self._walls.stand.seccomp:
            _kill_children(spared)


class _AbandonedError(Exception):
    """The pool is gone."""


def longest_run(seconds: float) -> float:
    """How long a run of so many seconds may last by the clock, where others have the processors."""
    return 10 * max(seconds, 1.0)


class Allowance:
    """The time of a run: so many seconds on a processor, and as many by the clock in which it does nothing at all.

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

    def __init__(self, keeper: Zygote, program: int, examiner: "_Child", requests: socket.socket) -> None:
        self._keeper, self._program = keeper, program
        self._examiner, self._requests = examiner, requests
        self._run: _Child | None = None
        self._runs = 0
        self._used_before = 0.0

    def follow(self, seconds: float, control: socket.socket) -> str:
        """Until the examiner has ended; each run that it asks for has `seconds`, see `Allowance`."""
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
            elif self._examiner.ending in happened:
                return DONE

    def _wait(self, control: socket.socket, end: float) -> set[int]:
        """Descriptors that can be read, of which those of processes mean their end; none when time is over."""
        poll = select.poll()
        for descriptor in (control.fileno(), self._requests.fileno(), self._examiner.ending):
            poll.register(descriptor, select.POLLIN)
        if self._run:
            poll.register(self._run.ending, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(max(0.0, end - time.monotonic()) * 1000)}

    def _used(self) -> float | None:
        """Seconds that the run and its examiner were on a processor; None where they may have started processes."""
        if not self._keeper.sees_all_work:
            return None
        return self._examiner.used() - self._used_before + (self._run.used() if self._run else 0.0)

    def _requested(self) -> list[int]:
        """Descriptors for a run; none where the examiner has ended, be it with a message that it did not read."""
        with suppress(ConnectionResetError):
            return list(socket.recv_fds(self._requests, 16, 4)[1])
        return []

    def _begin(self, descriptors: list[int]) -> None:
        if self._run:
            self._run.kill()
        self._keeper.clear(spared={self._examiner.pid})
        self._run = self._keeper.start(self._program, descriptors)
        self._runs += 1
        self._used_before = self._examiner.used()
        for descriptor in descriptors:
            os.close(descriptor)

    def _say(self, how: str) -> None:
        self._run = None
        with suppress(OSError):
            self._requests.send(f"{self._runs} {how}".encode())

    def end(self) -> None:
        """Kills what is left, and closes what the item had."""
        for child in (self._run, self._examiner):
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
    """Without walls: kills what this process has adopted, until nothing but the spared is left."""
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


def _examine(longest: int) -> int:
    """The life of an examiner's process."""
    start = _starter(socket.socket(fileno=_KEEPER))
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
    """Runs of the program by way of the keeper, which numbers them."""
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
    """The life of a program's process whose functions are tested."""
    run_functions(load(_PROGRAM), Channel(socket.socket(fileno=_CHANNEL), longest))
    return 0
