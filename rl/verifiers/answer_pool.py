"""Grades answers in child processes with a deadline; killing a process is all that stops a grader that hangs in C code.

A child works on one item at a time, so that a deadline covers one item's work and no queueing. An item whose grader
overruns or dies is ungradable, its child is replaced, and no other item is touched. Children are started by the pool's
own threads only: Linux sends the parent-death signal when the thread that started a child ends (prctl(2)), and the
caller's thread may end at any time.
"""

import ctypes
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn, cast

from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.verifiers.math.grader import EXAMPLES, grade
from lockstep.rl.verifiers.process_pool import ProcessPool

Grader = Callable[[str, str], Verdict]

_START_LIMIT = 60.0
_STARTS_TRIED = 3
_EXIT_GRACE = 1.0
_MEMORY = 4 << 30
_PR_SET_PDEATHSIG = 1


class AnswerPoolError(RuntimeError):
    """The pool cannot grade at all: its children do not start, or it is closed."""


class AnswerPool(ProcessPool["_Child"]):
    """`workers` child processes that grade (response, answer) pairs, each pair within `deadline` seconds of wall time.

    The grader is pickled by name, so it must live in an importable module: a lambda raises at once, a function of
    `__main__` at the first `grade`. Each child grades the examples before it takes an item, so that what a grader loads
    at its first formula is not charged to one. A child has 4 GiB of address space: a grader that wants more gets a
    MemoryError. Threads may share a pool. Close it, or use it as a context manager.
    """

    failure = AnswerPoolError

    def __init__(
        self, workers: int, deadline: float, grader: Grader = grade, examples: Sequence[tuple[str, str]] = EXAMPLES
    ) -> None:
        if workers < 1 or not deadline > 0:
            raise ValueError(f"a pool needs workers >= 1 and deadline > 0 s, not {workers} workers and {deadline} s")
        self._deadline = deadline
        self._grader = pickle.dumps((grader, tuple(examples)))
        super().__init__(workers, "verifier-pool")
        for started in [self._threads.submit(_Child, self._grader) for _ in range(workers)]:
            self._idle.put(started.result())

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict for each (response, reference answer), in order.

        Raises AnswerPoolError if children cannot start, or if the pool is closed before the last verdict.
        """
        return self._each(self._grade_one, pairs, "it was grading")

    def _grade_one(self, pair: tuple[str, str]) -> Verdict:
        child = self._ready_child()
        try:
            return child.grade(pair, self._deadline)
        finally:
            self._idle.put(child if child.alive else _Child(self._grader))

    def _ready_child(self) -> "_Child":
        """An idle child that has started; those found dead are replaced, so that no item pays for an earlier death."""
        for _ in range(_STARTS_TRIED):
            child = self._idle.get()
            problem = child.await_ready()
            if problem is None:
                return child
            self._idle.put(_Child(self._grader))
        raise AnswerPoolError(f"a grading process does not start: {problem}")


class _Child:
    """One grading process and the pool's end of its pipe. Used by one thread at a time."""

    def __init__(self, grader: bytes) -> None:
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _program(), str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._ready = False
        with suppress(OSError):  # await_ready finds out why it died
            self._connection.send_bytes(grader)

    @property
    def alive(self) -> bool:
        return not self._connection.closed

    def await_ready(self) -> str | None:
        """None once the child is ready; else what went wrong, and the child is killed."""
        try:
            if self._ready and not self._connection.poll():
                return None
            if not self._connection.poll(_START_LIMIT):
                return f"nothing heard in {_START_LIMIT} s (killed with exit code {self.kill()})"
            problem: str | None = self._connection.recv()
        except (EOFError, OSError):
            return f"it died with exit code {self.kill(_EXIT_GRACE)}"
        self._ready = problem is None
        if problem:
            self.kill()
        return problem

    def grade(self, pair: tuple[str, str], deadline: float) -> Verdict:
        """The child's verdict; ungradable, and the child killed, if it takes over `deadline` seconds or dies."""
        try:
            self._connection.send(pair)
            if self._connection.poll(deadline):
                verdict: Verdict = self._connection.recv()
                return verdict
        except (EOFError, OSError):
            return Verdict(Outcome.ungradable, f"grader died with exit code {self.kill(_EXIT_GRACE)}")
        self.kill()
        return Verdict(Outcome.ungradable, f"deadline of {deadline} s passed")

    def kill(self, grace: float = 0.0) -> int:
        """Ends the child and all that it started; its exit code, minus the signal's number if a signal ended it.

        A child that closed its pipe may be on its way out: `grace` seconds let it end by itself, with its own code.
        """
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        with suppress(ProcessLookupError, PermissionError):  # macOS refuses to signal a group of zombies
            os.killpg(self._process.pid, signal.SIGKILL)
        self._connection.close()
        return self._process.wait()


def _program() -> str:
    """The child's source. It gets our sys.path, which Ray and pytest extend without telling the environment."""
    return f"import sys; sys.path[:] = {sys.path!r}; from lockstep.rl.verifiers.answer_pool import serve; serve()"


def serve() -> None:
    """Main function of a child: reads the grader, reports ready, then grades pairs until the pipe closes.

    Logging is off up to warnings: what matters is in the verdict, and math_verify warns that it has no time limit.
    """
    descriptor, parent = (int(argument) for argument in sys.argv[1:3])
    _die_with(parent)
    os.set_inheritable(descriptor, False)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    logging.disable(logging.WARNING)
    with Connection(descriptor) as connection, suppress(EOFError, ConnectionError):
        grader = _load(connection)
        while grader:
            response, answer = connection.recv()
            try:
                connection.send(_guarded(grader, response, answer))
            except SystemExit as end:
                _leave(end.code)


def _load(connection: "Connection[Any, Any]") -> Grader | None:
    """The grader, warmed by its examples and announced as ready; or None, and the pool is told why it has none."""
    try:
        grader, examples = pickle.loads(connection.recv_bytes())
    except (ImportError, AttributeError) as error:
        connection.send(f"it cannot import the grader ({error}): define it in a module that can be imported")
        return None
    for example in examples:
        _guarded(grader, *example)
    connection.send(None)
    return cast(Grader, grader)


def _guarded(grader: Grader, response: str, answer: str) -> Verdict:
    try:
        verdict = grader(response, answer)
    except Exception as error:
        return Verdict(Outcome.ungradable, f"grader raised {type(error).__name__}: {error}"[:500])
    if isinstance(verdict, Verdict):
        return verdict
    return Verdict(Outcome.ungradable, f"grader returned {type(verdict).__name__}, not a Verdict")


def _leave(code: object) -> NoReturn:
    """Ends the process as `sys.exit(code)` does, but at once.

    An interpreter may take seconds to close, and the pool waits less between the end of the pipe and that of the child.
    """
    os._exit(code if isinstance(code, int) else int(code is not None))


def _die_with(parent: int) -> None:
    """Asks Linux to kill this process when its parent ends; elsewhere the end of the pipe does, between two items."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the pool's process ended while its child was starting")
