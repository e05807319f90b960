"""Grades answers in child processes with a deadline; killing a process is all that stops a grader that hangs in C code.

A child works on one item at a time, so that a deadline covers one item's work and no queueing. The deadline is of the
child's own processor time, which the kernel counts and enforces (ITIMER_PROF): a busy machine shortens nobody's.

A completion that its grader does not survive is incorrect, or a policy would learn to write what cannot be graded. It
is ungradable only where something else is at fault: where the reference alone overruns or kills a grader, or where the
child stood still. What died is tried once more, because somebody else may have killed it.

Children are started by the pool's own threads only: Linux sends the parent-death signal when the thread that started a
child ends (prctl(2)), and the caller's thread may end at any time.
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
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, Literal, NoReturn, cast

from lockstep.data.tasks.user_function import BadFunction
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.verifiers.math.grader import EXAMPLES, grade
from lockstep.rl.verifiers.process_pool import ProcessPool

Grader = Callable[[str, Any], Verdict]
"""Grades a response by its reference: an answer, or whatever else the grader takes."""

_START_LIMIT = 60.0
_STARTS_TRIED = 3
_EXIT_GRACE = 1.0
_MEMORY = 4 << 30
_PATIENCE = 10.0
"""Seconds by the clock for each second of the deadline, after which a child counts as standing still."""
_PR_SET_PDEATHSIG = 1


class AnswerPoolError(RuntimeError):
    """The pool cannot grade at all: its children do not start, or it is closed."""


@dataclass(frozen=True)
class _Lost:
    """A child that ended before its verdict: it used up its processor time, died by itself, or stood still."""

    how: Literal["overran", "died", "stood still"]
    reason: str


class AnswerPool(ProcessPool["_Child"]):
    """`workers` child processes that grade (response, answer), each within `deadline` seconds of its processor time.

    The grader is pickled by name, so it must live in an importable module: a lambda raises at once, a function of
    `__main__` at the first `grade`. It reads the answer before the response, and an empty response without harm: that
    is how the pool finds out whether the answer alone is at fault. Each child grades the examples before it takes an
    item, so that what a grader loads at its first formula is not charged to one. A child has 4 GiB of address space: a
    grader that wants more gets a MemoryError. Threads may share a pool. Close it, or use it as a context manager.
    """

    failure = AnswerPoolError

    def __init__(
        self, workers: int, deadline: float, grader: Grader = grade, examples: Sequence[tuple[str, Any]] = EXAMPLES
    ) -> None:
        if workers < 1 or not deadline > 0:
            raise ValueError(f"a pool needs workers >= 1 and deadline > 0 s, not {workers} workers and {deadline} s")
        self._deadline = deadline
        self._grader = pickle.dumps((grader, tuple(examples), deadline))
        super().__init__(workers, "verifier-pool")
        for started in [self._threads.submit(_Child, self._grader) for _ in range(workers)]:
            self._idle.put(started.result())

    def grade(self, pairs: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """One verdict for each (response, reference), in order.

        Raises AnswerPoolError if children cannot start, or if the pool is closed before the last verdict.
        """
        return self._each(self._grade_one, pairs, "it was grading")

    def _grade_one(self, pair: tuple[str, Any]) -> Verdict:
        found = self._attempt(pair)
        if isinstance(found, _Lost) and found.how == "died":
            found = self._attempt(pair)
        return found if isinstance(found, Verdict) else self._blame(found, pair[1])

    def _blame(self, lost: _Lost, answer: str) -> Verdict:
        """Incorrect where the same grader gets through the reference answer alone; else ungradable."""
        alone = self._attempt(("", answer)) if lost.how != "stood still" else lost
        fault = isinstance(alone, Verdict) and alone.outcome is not Outcome.ungradable
        return Verdict(Outcome.incorrect if fault else Outcome.ungradable, lost.reason)

    def _attempt(self, pair: tuple[str, Any]) -> "Verdict | _Lost":
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

    def grade(self, pair: tuple[str, Any], deadline: float) -> Verdict | _Lost:
        """The child's verdict; if it dies, overruns its deadline or stands still, how, and it is dead."""
        try:
            self._connection.send(pair)
            if self._connection.poll(_PATIENCE * deadline):
                verdict: Verdict = self._connection.recv()
                return verdict
        except (EOFError, OSError):
            code = self.kill(_EXIT_GRACE)
            if code == -signal.SIGPROF:
                return _Lost("overran", f"deadline of {deadline} s passed")
            return _Lost("died", f"grader died with exit code {code}")
        self.kill()
        return _Lost("stood still", f"nothing heard in {_PATIENCE * deadline} s, with a deadline of {deadline} s left")

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
        grader, deadline = _load(connection)
        while grader:
            response, answer = connection.recv()
            signal.setitimer(signal.ITIMER_PROF, deadline)  # whose signal ends the process, in C code as well
            try:
                verdict = _guarded(grader, response, answer)
            except SystemExit as end:
                _leave(end.code)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(verdict)


def _load(connection: "Connection[Any, Any]") -> tuple[Grader | None, float]:
    """The grader, warmed by its examples and announced as ready, and the deadline.

    None where the grader cannot be loaded; the pool has been told why.
    """
    try:
        grader, examples, deadline = pickle.loads(connection.recv_bytes())
    except (ImportError, AttributeError) as error:
        connection.send(f"it cannot import the grader ({error}): define it in a module that can be imported")
        return None, 0.0
    except BadFunction as error:
        connection.send(str(error))
        return None, 0.0
    for example in examples:
        _guarded(grader, *example)
    connection.send(None)
    return cast(Grader, grader), deadline


def _guarded(grader: Grader, response: str, answer: Any) -> Verdict:
    """The grader's verdict; where it raises, the response is incorrect if the answer alone raises nothing."""
    try:
        return _checked(grader(response, answer))
    except Exception as error:
        reason = f"grader raised {type(error).__name__}: {error}"[:500]
    try:
        fault = _checked(grader("", answer)).outcome is not Outcome.ungradable
    except Exception:  # as the grader raised before
        fault = False
    return Verdict(Outcome.incorrect if fault else Outcome.ungradable, reason)


def _checked(verdict: object) -> Verdict:
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
