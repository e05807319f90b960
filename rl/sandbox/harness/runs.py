"""Runs of the program, as the harness asks for them."""

from collections.abc import Callable
from dataclasses import dataclass

from lockstep.rl.sandbox.time_limit import RequestClock

Start = Callable[[list[int]], Callable[[], str]]
"""Starts a run of the program with these descriptors (input, output, errors, and a channel for functions); the result
waits for its end and says how it ended, empty for exit code 0. Descriptor 0 of the harness is /dev/null."""


@dataclass(frozen=True)
class Runs:
    """How the program is run, the clock of requests to it, and the bound on output and on each answer, in bytes."""

    start: Start
    clock: RequestClock
    longest: int
