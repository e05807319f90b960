"""A program pays for its own work and idleness, and neither for that of others nor for that of the tests."""

import os
import time

import pytest

from lockstep.rl.sandbox.time_limit import DEADLINE, ENDLESS, OVERLONG, STARVED, Allowance, RequestClock, Spent


def judged(
    works: float = 0.0,
    waits: float | None = 0.0,
    asked: float = 1.0,
    huge: bool = False,
    seconds: float = 2.0,
) -> tuple[str, float]:
    """How an endless run is ended, and when: `works`, `waits` and `asked` are shares of the clock."""
    allowance, now = Allowance(seconds, 100.0), 100.0
    while True:
        now = allowance.end
        passed = now - 100.0
        spent = Spent(works * passed, None if waits is None else waits * passed, asked * passed, huge)
        if over := allowance.over(spent, now):
            return over, pytest.approx(passed, abs=0.1)


def test_work_is_charged_on_a_processor() -> None:
    assert judged(works=1.0) == (DEADLINE, 2.0)
    assert judged(works=4.0) == (DEADLINE, 2.0)
    assert judged(works=0.5, waits=0.5) == (DEADLINE, 4.0)
    assert judged(works=0.05, waits=0.95) == (STARVED, 20.0)


def test_doing_nothing_is_charged_whether_all_at_once_or_little_by_little() -> None:
    assert judged() == (DEADLINE, 2.0)
    assert judged(works=0.01) == (DEADLINE, 2.0)
    assert judged(works=0.5) == (DEADLINE, 4.0)
    assert judged(waits=0.5) == (DEADLINE, 4.0)
    assert judged(seconds=0.1) == (DEADLINE, 1.0)


def test_the_time_of_the_tests_is_not_charged() -> None:
    assert judged(asked=0.0) == (OVERLONG, 20.0)
    assert judged(works=0.01, asked=0.02) == (OVERLONG, 20.0)
    assert judged(works=0.01, asked=0.02, huge=True) == (ENDLESS, 20.0)
    assert judged(works=0.4, asked=0.4) == (DEADLINE, 5.0)


def test_a_machine_that_stands_still_is_not_the_program() -> None:
    allowance = Allowance(2.0, 100.0)
    for now in (112.0, 112.9, 113.8):
        assert allowance.over(Spent(1.9, 0.0, now - 100.0), now) == ""
    assert allowance.over(Spent(1.9, 0.0, 14.0), 114.0) == DEADLINE


def test_where_the_kernel_does_not_tell_who_works_a_little_may_have_waited() -> None:
    assert judged(works=0.05, waits=None) == (STARVED, 20.0)
    assert judged(works=1.0, waits=None) == (DEADLINE, 2.0)
    assert judged(waits=None) == (DEADLINE, 2.0)


def test_the_clock_of_requests_is_read_by_another_process() -> None:
    clock, (ready, say_ready), (go, say_go) = RequestClock(), os.pipe(), os.pipe()
    clock.restart()
    pid = os.fork()
    if pid == 0:
        clock.begin()
        begun = time.process_time()
        while time.process_time() < begun + 0.1:
            pass
        clock.end()
        clock.saw_huge()
        clock.begin()
        os.write(say_ready, b"r")
        os.read(go, 1)
        os._exit(0)
    os.read(ready, 1)
    used = time.clock_gettime(~pid << 3 | 2)
    now = time.monotonic()
    elapsed, worked, huge = clock.read(now, used)
    later, no_more, _ = clock.read(now + 5.0, used)
    os.write(say_go, b"g")
    os.waitpid(pid, 0)
    assert 0.1 <= worked <= elapsed + 0.01
    assert huge
    assert later - elapsed == pytest.approx(5.0)
    assert no_more == worked
    clock.restart()
    assert clock.read(time.monotonic(), 0.0) == (0.0, 0.0, False)
    clock.leave()
