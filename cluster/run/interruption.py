"""Ends a run on Ctrl-C, SIGTERM or at its deadline after the step under way, so that it can save.

A second signal ends it at once. A deadline is a signal, too: SIGXCPU, which others may send to say that time is up.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Timer
from types import FrameType, TracebackType

CLEAN_UP_S = 30.0
"""Seconds that the end of a run may take after its last checkpoint."""
OUT_OF_TIME = signal.SIGXCPU


JOB_START, ALLOCATION_START, ALLOCATION_END = "LOCKSTEP_JOB_START_TIME", "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"
"""Environment variables, in seconds since 1970: of a job that was submitted, and of Slurm's allocation."""


class OutOfTime(KeyboardInterrupt):
    """The run was told to end because its time is up."""


class TooShort(ValueError):
    """A run that may not take as long as it needs to save."""


def deadline(max_hours: float | None, grace: float, environment: Mapping[str, str], began: float) -> float | None:
    """When a run has to be gone, in seconds since 1970: after so many hours, or with its allocation; None if never.

    The clock counts from the start of the job, else from that of the allocation, else from that of the process.

    Args:
        grace: seconds that the last step and the last save may take.
        began: when the process began, in seconds since 1970.

    Raises:
        TooShort: when nothing is left of so many hours for steps.
    """
    limits = [float(environment[ALLOCATION_END])] if environment.get(ALLOCATION_END) else []
    if max_hours is not None:
        needed = grace + CLEAN_UP_S
        if max_hours * 3600 <= needed:
            raise TooShort(
                f"max_hours={max_hours:g} is {max_hours * 3600:.0f} s, and {needed:.0f} s of them are kept for the "
                "last step and checkpoint: allow more hours, or lower checkpoints.grace"
            )
        start = environment.get(JOB_START) or environment.get(ALLOCATION_START) or began
        limits.append(float(start) + max_hours * 3600)
    return min(limits, default=None)


class Interruption:
    """Raises KeyboardInterrupt in the main thread when the run is told to end, and ends as `OutOfTime` if time was up.

    It is made one in the end: Ray, while it waits, puts an exception of its own in the place of one from a handler.


    The first signal waits for the end of a `deferred` block, a step or the last save. A second one does not, nor does
    the end of the grace period. Later ones, and any outside of such blocks, are ignored, so that clean-up ends.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, OUT_OF_TIME)

    def __init__(self, grace: float, say: Callable[[str], object], deadline: float | None = None) -> None:
        """
        Args:
            grace: seconds that the step under way and the last save may take together; with 0 nothing is deferred.
            say: prints a sentence for the user.
            deadline: when the run has to be gone, in seconds since 1970; it is told to end so long before as it may
                need to.
        """
        self.cause: signal.Signals | None = None
        """The first signal that came."""
        self._grace, self._say = grace, say
        self._urgent, self._deferring = False, 0
        self._end_of_grace = self._timer(grace, signal.SIGTERM)
        left = None if deadline is None else deadline - grace - CLEAN_UP_S - time.time()
        self._end_of_time = None if left is None else self._timer(max(0.0, left), OUT_OF_TIME)

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}
        self.listen()
        if self._end_of_time:
            self._end_of_time.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for timer in filter(None, (self._end_of_grace, self._end_of_time)):
            timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.cause == OUT_OF_TIME and isinstance(error, KeyboardInterrupt):
            raise OutOfTime from error

    def listen(self) -> None:
        """Install the signal handlers; again after something else replaced them, as `ray.init` does."""
        for number in self.SIGNALS:
            signal.signal(number, self._receive)

    @property
    def may_save(self) -> bool:
        """Whether the run was told to end, and has time to save."""
        return self.cause is not None and not self._urgent and self._grace > 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that the first signal does not cut short; KeyboardInterrupt is raised when it has ended."""
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1
        if self.cause is not None:
            raise KeyboardInterrupt

    def end(self, step: int, save: Callable[[], object]) -> str:
        """End a run that was told to: save first, if there is time; returns how it ended, in a sentence.

        Args:
            step: the last one that it has taken.
            save: saves what is not saved yet, and returns when it is on disk. A second signal cuts it short.
        """
        by = self._cause() if self.cause in (None, OUT_OF_TIME) else f"interrupted by {self._cause()}"
        if not step:
            return f"{by} before its first step"
        saved = self.may_save and self._ended(save)
        return f"{by} after step {step}, which {'is' if saved else 'may not be'} saved"

    def _ended(self, save: Callable[[], object]) -> bool:
        """Whether a save came to its end."""
        self._deferring += 1
        try:
            save()
        except KeyboardInterrupt:
            return False
        finally:
            self._deferring -= 1
        return True

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.cause is None:
            self._first(signal.Signals(number))
        elif self._deferring and not self._urgent:
            self._urgent = True
            raise KeyboardInterrupt

    def _first(self, cause: signal.Signals) -> None:
        self.cause = cause
        if not self._grace:
            raise KeyboardInterrupt
        self._end_of_grace.start()
        if self._end_of_time:
            self._end_of_time.cancel()  # else it would be the second signal
        if not self._deferring:
            raise KeyboardInterrupt
        self._say(
            f"{self._cause()}: the run ends its step and saves, within {self._grace:g} s; a second signal ends it at "
            "once"
        )

    def _cause(self) -> str:
        if self.cause is None:
            return "interrupted"
        return "out of time" if self.cause == OUT_OF_TIME else self.cause.name

    @staticmethod
    def _timer(seconds: float, number: signal.Signals) -> Timer:
        timer = Timer(seconds, os.kill, (os.getpid(), number))
        timer.daemon = True
        return timer
