"""A forked process as its parent sees it: its end, and its seconds on a processor and waiting for one."""

import os
import re
import signal
import time
from contextlib import suppress


def open_processes() -> int | None:
    """A descriptor of /proc, which outlives a change of the root; None where it does not tell how long threads wait."""
    with suppress(OSError):
        os.stat("/proc/self/schedstat")
        return os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    return None


class Child:
    """A forked process; `ending` can be read when it has ended."""

    def __init__(self, pid: int, processes: int | None) -> None:
        """
        Args:
            processes: from `open_processes`.
        """
        self.pid = pid
        self.ending = os.pidfd_open(pid)
        self._processes = processes

    def used(self) -> float:
        """Seconds that its threads were on a processor: the clock of clock_getcpuclockid(3)."""
        return time.clock_gettime(~self.pid << 3 | 2)

    def waited(self) -> float | None:
        """Seconds that its threads wanted a processor and had none; None where the kernel does not tell.

        The second number of /proc/PID/task/TID/schedstat, in nanoseconds (Documentation/scheduler/sched-stats.rst).
        """
        if self._processes is None:
            return None
        try:
            threads = self._open(f"{self._outer_pid()}/task", os.O_DIRECTORY)
        except OSError:
            return None
        try:
            return sum(_run_delay(threads, name) for name in os.listdir(threads)) / 1e9
        except (OSError, ValueError, IndexError):
            return None
        finally:
            os.close(threads)

    def _outer_pid(self) -> str:
        """Its number in the namespace of `processes`, which is not ours."""
        with open(self._open(f"self/fdinfo/{self.ending}", os.O_RDONLY)) as file:
            found = re.search(r"^Pid:\s*(\d+)", file.read(), re.MULTILINE)
        return found[1] if found else "0"

    def _open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_RDONLY, dir_fd=self._processes)

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


def _run_delay(threads: int, name: str) -> int:
    """Nanoseconds; none for a thread that has ended meanwhile."""
    try:
        descriptor = os.open(f"{name}/schedstat", os.O_RDONLY, dir_fd=threads)
    except FileNotFoundError:
        return 0
    try:
        return int(os.read(descriptor, 128).split()[1])
    except ProcessLookupError:
        return 0
    finally:
        os.close(descriptor)


def _signal_name(number: int) -> str:
    """As "SIGKILL"; most real-time signals have a number only."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def kill_children(spared: set[int]) -> None:
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
