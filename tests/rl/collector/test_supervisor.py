"""A worker that dies again and again ends the run, one whose work came to something in between does not."""

import pytest

from lockstep.rl.collector.supervisor import DEATHS, WATCH_S, Supervisor
from lockstep.rl.remote import WorkerDied, WorkerFailed


def test_deaths_count_until_something_comes_of_the_work() -> None:
    supervisor = Supervisor(lambda: None, lambda: 0.0)
    for _ in range(DEATHS):
        supervisor.count_death("verifier 0", WorkerDied("first"))
    supervisor.count_death("verifier 1", WorkerDied("another worker"))
    supervisor.count_result("verifier 0")
    for _ in range(DEATHS):
        supervisor.count_death("verifier 0", WorkerDied("later"))
    with pytest.raises(WorkerDied, match="last"):
        supervisor.count_death("verifier 0", WorkerDied("last"))


def test_replacements_count_when_they_have_started() -> None:
    supervisor = Supervisor(lambda: None, lambda: 0.0)
    started = []
    supervisor.replace(lambda: started.append(1))
    assert (started, supervisor.replaced) == ([1], 1)

    def fail() -> None:
        raise WorkerDied("again")

    with pytest.raises(WorkerDied):
        supervisor.replace(fail)
    assert supervisor.replaced == 1


def test_the_policy_is_looked_at_once_in_a_while() -> None:
    now, looks = [0.0], list[float]()

    def look() -> None:
        looks.append(now[0])
        if now[0] > 5 * WATCH_S:
            raise WorkerFailed("policy 0")

    supervisor = Supervisor(look, lambda: now[0])
    for step in range(10):
        now[0] = step * WATCH_S / 2
        supervisor.watch()
    assert looks == [1.5 * WATCH_S, 3 * WATCH_S, 4.5 * WATCH_S]
    now[0] = 6 * WATCH_S
    with pytest.raises(WorkerFailed, match="policy 0"):
        supervisor.watch()
