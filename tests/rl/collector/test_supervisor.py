"""A worker that dies again and again ends the run, one whose work came to something in between does not."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lockstep.rl.collector.supervisor import DEATHS, PLACE_S, WATCH_S, LostWorkers, Replacement, Supervisor
from lockstep.rl.remote import Call, Place, WorkerDied, WorkerFailed, any_of, gather
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.workers.stubs import VerifierWorker
from lockstep.rl.workers.worker_groups import VerifierGroup
from tests.rl.conftest import Actors


def test_deaths_count_until_something_comes_of_the_work() -> None:
    supervisor = Supervisor(lambda: None, lambda: 0.0)
    for _ in range(DEATHS):
        supervisor.count_death("verifier 0", WorkerDied("first"))
    supervisor.count_death("verifier 1", WorkerDied("another worker"))
    supervisor.count_result("verifier 0")
    for _ in range(DEATHS):
        supervisor.count_death("verifier 0", WorkerDied("later"))
    with pytest.raises(WorkerFailed, match=r"last .*died 4 times before anything came of its work"):
        supervisor.count_death("verifier 0", WorkerDied("last"))


def test_a_replacement_that_dies_is_one_more_death() -> None:
    now, tries = [0.0], list[int]()
    supervisor = Supervisor(lambda: None, lambda: now[0])

    def replacing(number: int) -> Iterator[Sequence[Call[Any]]]:
        tries.append(number)
        if len(tries) == 1:
            raise WorkerDied("never ran")
        yield []

    lost = LostWorkers("environment", 2, replacing, supervisor)
    lost.add(1, WorkerDied("first"))
    lost.proceed()
    assert (tries, supervisor.replaced, lost.living) == ([1], 0, [0]), "the other goes on meanwhile"
    lost.proceed()
    assert tries == [1], "and there is a pause after the second death"
    now[0] += WATCH_S
    lost.proceed()
    assert (tries, supervisor.replaced, lost.living) == ([1, 1], 1, [0, 1])
    for _ in range(DEATHS - 2):
        supervisor.count_death("environment 1", WorkerDied("later"))
    with pytest.raises(WorkerFailed, match="last"):
        lost.add(1, WorkerDied("last"))


@pytest.fixture
def verifiers(actors: Actors) -> Iterator[VerifierGroup]:
    """A verifier worker on the cluster that tests share, and room for another."""
    group = VerifierGroup(VerifierConfig())
    yield group
    group.workers[0].end()


def test_a_worker_is_replaced_while_others_go_on_and_its_place_is_waited_for(verifiers: VerifierGroup) -> None:
    now, dead = [0.0], verifiers.workers[0]
    supervisor = Supervisor(lambda: None, lambda: now[0])
    nowhere = Place({"num_cpus": 1000})
    verifiers.places = [nowhere]
    replacement = Replacement("verifier 0", WorkerDied("first"), lambda: verifiers.replacing(0), supervisor)
    replacement.proceed()
    assert verifiers.workers[0] is not dead
    assert len(replacement.calls) == 1
    assert not replacement.is_ready
    replacement.check_place()
    now[0] = PLACE_S + 1
    with pytest.raises(WorkerFailed, match="verifier 0 died, no other is left, and for 600 s the cluster had no place"):
        replacement.check_place()
    verifiers.workers[0].end()  # as a node is lost on which it was to start
    any_of(replacement.calls)
    replacement.proceed()
    verifiers.places = []
    assert replacement.calls == []
    now[0] += WATCH_S
    replacement.proceed()
    any_of(replacement.calls)
    replacement.proceed()
    assert replacement.is_ready
    assert gather([verifiers.workers[0].call(VerifierWorker.pid)])[0] > 0


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
