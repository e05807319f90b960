"""A sandbox as its pool sees it: the zygote's process, which judges one item at a time and can be killed as a whole."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import lockstep
from lockstep.rl.sandbox import libraries
from lockstep.rl.sandbox.harness.standard_streams import Observation
from lockstep.rl.sandbox.isolation import Isolation, SandboxError, SandboxLimits
from lockstep.rl.sandbox.time_limit import DEADLINE, ENDLESS, OVERLONG, STARVED, longest_run
from lockstep.rl.verdict import Outcome, Verdict

_START_LIMIT = 60.0
_PATIENCE = 20.0
"""Seconds beyond all deadlines of an item after which the zygote itself is taken for dead."""
_EXIT_GRACE = 1.0
_LONGEST_VERDICT = 1 << 16


class Sandbox:
    """Handle of a zygote's process. Used by one thread at a time; started by a thread that lives as long as it."""

    def __init__(self, limits: SandboxLimits, uses: Isolation, offered: Sequence[str] = ()) -> None:
        """Starts the process with as much of `uses` as the kernel grants; `await_ready` waits for it.

        Args:
            offered: files and folders of libraries; see `distributions.located`.

        Raises:
            SandboxError: where no process can be started.
        """
        if sys.platform != "linux":
            raise SandboxError(f"programs are isolated by mechanisms that only Linux has, and this is {sys.platform}")
        self._limits, self._offered = limits, frozenset(map(libraries.module_name, offered))
        settings = json.dumps({"uses": asdict(uses), "limits": asdict(limits), "libraries": list(offered)})
        try:
            self._control, self._process = _started(settings)
        except OSError as error:
            raise SandboxError(f"a sandbox does not start: {error}") from error

    @property
    def alive(self) -> bool:
        """Whether it can judge."""
        return self._control.fileno() != -1

    def await_ready(self) -> tuple[Isolation, str]:
        """The active isolation, and what the kernel refused. Raises SandboxError if the process does not start."""
        said = self._hear(_START_LIMIT)
        if not said:
            code = self.kill(_EXIT_GRACE)
            raise SandboxError(f"a sandbox does not start (exit code {code}): its standard error says more")
        told = json.loads(said)
        return Isolation(**told["isolation"]), told["refused"]

    def judge(self, program: bytes, tests: bytes, runs: int) -> Verdict:
        """The verdict of tests on a program in at most `runs` runs; ungradable if the sandbox itself fails."""
        try:
            said, reply = self._told(program, tests, runs)
        except OSError as error:
            return Verdict(Outcome.ungradable, f"the sandbox failed ({error})")
        if said is None:
            return Verdict(Outcome.ungradable, f"the sandbox failed (exit code {self.kill(_EXIT_GRACE)})")
        if reply:
            outcome, reason = json.loads(reply)
            return Verdict(Outcome(outcome), reason)
        if said == DEADLINE:
            return Verdict(Outcome.incorrect, f"deadline of {self._limits.seconds} s passed")
        if said == ENDLESS:
            return Verdict(Outcome.incorrect, f"{self._overlong()} with the huge answers of the program")
        if said == OVERLONG:
            return Verdict(Outcome.ungradable, f"{self._overlong()} by themselves: shorten them, or raise the limit")
        if said == STARVED:
            return Verdict(Outcome.ungradable, f"{self._starved()}: judge fewer at a time, or raise the limit")
        return Verdict(Outcome.ungradable, "the harness ended without a verdict")

    def run(self, program: bytes, stdin: str) -> Observation:
        """Runs a program; returns what it prints. Raises SandboxError if the sandbox itself fails."""
        try:
            said, reply = self._told(program, json.dumps(stdin).encode(), 1)
        except OSError as error:
            raise SandboxError(f"the sandbox failed ({error})") from error
        if said is None:
            raise SandboxError(f"the sandbox failed (exit code {self.kill(_EXIT_GRACE)})")
        if reply:
            return Observation(*json.loads(reply))
        if said == DEADLINE:
            return Observation("", f"ran longer than {self._limits.seconds} s")
        raise SandboxError(self._starved() if said == STARVED else "the harness ended without a word")

    def _overlong(self) -> str:
        return f"the tests did not end in {longest_run(self._limits.seconds)} s"

    def _starved(self) -> str:
        seconds = self._limits.seconds
        return f"in {longest_run(seconds)} s the machine had less than {seconds} s for the program"

    def _told(self, program: bytes, tests: bytes, runs: int) -> tuple[str | None, bytes]:
        """What the zygote and the harness say of a program."""
        wanted = libraries.mentioned(f"{program.decode()} {tests.decode()}", self._offered)
        ours, theirs = os.pipe()
        with open(ours, "rb") as reply:
            with open(theirs, "wb") as answer, _file(program) as code, _file(tests) as checks:
                files = [code, checks, answer.fileno()]
                with suppress(BrokenPipeError, ConnectionResetError):  # it has ended, which the next line finds
                    socket.send_fds(self._control, [" ".join(["item", *wanted]).encode()], files)
            said = self._hear((runs + 1) * longest_run(self._limits.seconds) + _PATIENCE)
            return said, b"" if said is None else reply.read(_LONGEST_VERDICT)

    def _hear(self, seconds: float) -> str | None:
        """The zygote's next message; None if none comes in time, or it has ended."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        with suppress(OSError):
            return self._control.recv(_LONGEST_VERDICT).decode() or None
        return None

    def kill(self, grace: float = 0.0) -> int:
        """Ends the process and all in it; its exit code, minus the signal's number if a signal ended it.

        `grace` seconds let a process that is ending do so with a code of its own.
        """
        if self._process.returncode is not None and not self.alive:
            return self._process.returncode  # its number may be another's by now
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        self._control.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


def _started(settings: str) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-S", "-s", "-X", "utf8", "-c", _program(), str(theirs.fileno()), settings],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=_environment(),
            cwd="/",
            start_new_session=True,
        )
    return control, process


@contextmanager
def _file(content: bytes) -> Iterator[int]:
    """The descriptor of a file in memory."""
    with open(os.memfd_create("item"), "wb", buffering=0) as file:
        file.write(content)
        yield file.fileno()


def _environment() -> dict[str, str]:
    """The library path alone; strings hash alike, so that verdicts repeat, and libraries start no threads."""
    path = os.environ.get("LD_LIBRARY_PATH")
    return {"PYTHONHASHSEED": "0"} | libraries.ONE_THREAD | ({"LD_LIBRARY_PATH": path} if path else {})


def _program() -> str:
    """Source of the zygote's process: it imports this package; programs then import Python's library alone."""
    room = str(Path(lockstep.__file__).absolute().parents[1])
    imports = "from lockstep.rl.sandbox.entrypoint import main"
    return f"import sys; sys.path.insert(0, {room!r}); {imports}; sys.path.remove({room!r}); main()"
