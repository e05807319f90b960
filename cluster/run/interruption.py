"""Ends a run on Ctrl-C or SIGTERM after the step under way, so that it can save; on a second signal at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from types import FrameType


class Interruption:
    """Raises KeyboardInterrupt in the main thread when the run is told to end.

    The first signal waits for the end of a `deferred` block, a step or the last save. A second one does not, nor does
    the end of the grace period. Later ones, and any outside of such blocks, are ignored, so that clean-up ends.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, grace: float, say: Callable[[str], object]) -> None:
        """
        Args:
            grace: seconds that the step under way and the last save may take together; with 0 nothing is deferred.
            say: prints a sentence for the user.
        """
        self.cause: signal.Signals | None = None
        """The first signal that came."""
        self._grace, self._say = grace, say
        self._urgent, self._deferring = False, 0
        self._deadline = Timer(grace, os.kill, (os.getpid(), signal.SIGTERM))
        self._deadline.daemon = True

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._deadline.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
        by = f"interrupted by {self.cause.name}" if self.cause else "interrupted"
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
        self._deadline.start()
        if not self._deferring:
            raise KeyboardInterrupt
        self._say(
            f"{cause.name}: the run ends its step and saves, within {self._grace:g} s; a second signal ends it at once"
        )
