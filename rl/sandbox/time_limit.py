"""The time limit of a run: what is charged to a program, and when it is over.

A program pays for its seconds on a processor, for those in which its answers are read, and for those in which tests
wait for it and it does nothing. It does not pay where others have the processor, nor where tests work or sleep.
"""

import mmap
import struct
import time
from dataclasses import dataclass

DEADLINE, STARVED, OVERLONG, ENDLESS = "deadline", "starved", "overlong", "endless"
"""How time is over: used by the program, by others on the machine, by the tests, or by tests of a huge answer."""


def longest_run(seconds: float) -> float:
    """How long a run of so many seconds may last by the clock, where others have the processors or the tests work."""
    return 10 * max(seconds, 1.0)


class RequestClock:
    """How long requests have taken, in memory that the zygote and its harness share, and a guest lets go of at once.

    A request begins before a message is sent to the program, and ends when its answer is read.
    """

    _FORM = struct.Struct("dddd?")
    """Seconds of ended requests by the clock and on the harness's processor; when this one began on both, or zero;
    whether an answer held a number so large that tests may count up to it for ever."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._passed = self._worked = 0.0
        self._huge = False

    def begin(self) -> None:
        """The harness: a request begins."""
        self._begun = time.monotonic(), time.process_time()
        self._write(*self._begun)

    def end(self) -> None:
        """The harness: the answer is read."""
        begun, used = self._begun
        self._passed += time.monotonic() - begun
        self._worked += time.process_time() - used
        self._write(0.0, 0.0)

    def saw_huge(self) -> None:
        """The harness: an answer held a huge number."""
        self._huge = True

    def _write(self, begun: float, used: float) -> None:
        self._memory[: self._FORM.size] = self._FORM.pack(self._passed, self._worked, begun, used, self._huge)

    def restart(self) -> None:
        """The zygote: a new harness follows."""
        self._memory[: self._FORM.size] = bytes(self._FORM.size)

    def leave(self) -> None:
        """A guest: the memory is out of its reach."""
        self._memory.close()

    def read(self, now: float, used: float) -> tuple[float, float, bool]:
        """Seconds of all requests, by the clock and on the harness's processor, and whether an answer was huge.

        Args:
            now: by the clock.
            used: seconds that the harness has been on a processor.
        """
        passed, worked, begun, used_before, huge = self._FORM.unpack(self._whole())
        if begun:
            passed, worked = passed + now - begun, worked + used - used_before
        return passed, worked, huge

    def _whole(self) -> bytes:
        """What is written, and not half of it."""
        size = self._FORM.size
        while (seen := self._memory[:size]) != self._memory[:size]:
            pass
        return seen


@dataclass(frozen=True)
class Spent:
    """Seconds of a run so far."""

    worked: float
    """On a processor: the program, and the harness while it reads answers."""
    waited: float | None
    """For a processor that others had; None where the kernel does not tell."""
    elapsed: float
    """By the clock, while tests waited for the program."""
    huge: bool = False


class Allowance:
    """The time limit of a run: so many seconds of work, and as many, or one, of doing nothing in a request."""

    def __init__(self, seconds: float, now: float) -> None:
        self._seconds, self._idle = seconds, max(seconds, 1.0)
        self._begun, self._last = now, now + longest_run(seconds)
        self._stood_still = self._guessed = self._worked = 0.0
        self.end = now + seconds

    def over(self, spent: Spent, now: float) -> str:
        """At `end`, or later: how time is over; or nothing, and there is a new end."""
        if now > self.end + self._idle / 2:  # nobody was woken: the whole machine has stood still
            self._stood_still += now - self.end
        idle = spent.elapsed - spent.worked - self._waited(spent) - self._stood_still
        if spent.worked >= self._seconds or idle >= self._idle:
            return DEADLINE
        if now >= self._last:
            if 2 * spent.elapsed > now - self._begun:
                return STARVED
            return ENDLESS if spent.huge else OVERLONG
        left = min(self._seconds - spent.worked, self._idle - idle)
        self.end = min(self._last, now + max(left, 0.01))
        return ""

    def _waited(self, spent: Spent) -> float:
        """Where the kernel does not tell: who has had some of a processor since the last time may have wanted more."""
        if spent.waited is not None:
            return spent.waited
        if spent.worked > self._worked:
            self._worked, self._guessed = spent.worked, spent.elapsed - spent.worked
        return self._guessed
