"""Episodes of a process that dies or stands still begin again, once, and none is lost or answered twice."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from lockstep.rl.collector.episode_service import Continued, Ended, EpisodeService
from lockstep.rl.collector.supervisor import WATCH_S, Supervisor
from lockstep.rl.environments.config import EnvironmentConfig
from lockstep.rl.remote import Place, any_of, gather
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.output_processor import RolloutRequest
from lockstep.rl.types import Completion, Prompt, Rollout
from lockstep.rl.verdict import Outcome
from lockstep.rl.workers.base import Worker
from lockstep.rl.workers.worker_groups import EnvironmentGroup
from tests.rl.conftest import Actors

Start = Callable[..., EnvironmentGroup]


@pytest.fixture
def start(actors: Actors) -> Iterator[Start]:
    """Starts environments that ask on after every turn, in processes of their own."""
    groups = list[EnvironmentGroup]()

    def started(**given: object) -> EnvironmentGroup:
        values = {"kind": "tests.rl.environments.episodes:Asking", "turns": 3, "deadline": 1.0} | given
        groups.append(EnvironmentGroup(EnvironmentConfig.model_validate(values), actors.tokenizer.files, chat=False))
        gather(groups[-1].ready())
        return groups[-1]

    yield started
    for group in groups:
        for worker in group.workers:
            worker.end()


def completed(sample: int, begun: Completion | None = None) -> Rollout:
    """A completion that a team hands in: one token more, behind what there is."""
    first = Completion(sample, (7,), (-1.0,), "", "stop", (0,))
    grown = begun and replace(
        begun,
        tokens=(*begun.tokens, 8),
        logp=(*begun.logp, -1.0),
        weight_versions=(*begun.weight_versions, 0),
        written=(*begun.written, True),
        finish_reason="stop",
    )
    return (grown or first).with_prompt(Prompt(sample, "", (1, 2), ""))


def asked(service: EpisodeService, sample: int) -> RolloutRequest:
    """Hands in the first turn of a sample."""
    request = RolloutRequest(sample, (1, 2), SamplingParams(max_new_tokens=50), seed=0)
    assert service.answer(1, request, completed(sample)) is None
    return request


def answers(service: EpisodeService) -> list[Continued | Ended | None]:
    found = []
    while service.has_work:
        service.replace()
        service.patience()
        found += [service.take(call) for call in any_of(list(service.calls), 0.1)]
    return found


def pids(group: EnvironmentGroup) -> list[int]:
    return gather([worker.call(Worker.pid) for worker in group.workers])


def until_whole(service: EpisodeService, now: list[float]) -> None:
    """Goes on until no process is being replaced."""
    while service.patience() is not None:
        now[0] += WATCH_S
        service.replace()
        any_of([], 0.05)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_episodes_begin_again_once_where_their_process_is_gone(sent: signal.Signals, start: Start) -> None:
    now, environments = [0.0], start()
    supervisor = Supervisor(lambda: None, lambda: now[0])
    service = EpisodeService(environments, supervisor, lambda: now[0])
    for attempt in range(2):
        until_whole(service, now)
        os.kill(pids(environments)[0], sent)
        requests = [asked(service, sample) for sample in range(3)]
        now[0] += environments.patience + 1  # a process that stands still is given up, and one that is killed has ended
        found = answers(service)
        assert len(found) == 3
        if attempt == 0:
            again = [each.request for each in found if isinstance(each, Continued)]
            assert sorted(again, key=lambda request: request.number) == [replace(r, begun=None) for r in requests]
    for each in found:
        assert isinstance(each, Ended)
        assert each.verdict is not None
        assert each.verdict.outcome is Outcome.ungradable
        assert each.verdict.reason == "its environment's process died, or hung, twice"
    asked(service, 3)
    assert (len(service.calls), service.has_work, supervisor.replaced) == (0, True, 1), "it waits for a process"
    now[0] += WATCH_S
    [answer] = answers(service)
    assert supervisor.replaced == 2
    assert isinstance(answer, Continued)
    assert answer.request.begun is not None, "and others go on in the new process"


def test_an_episode_whose_process_died_while_the_model_wrote_begins_again(start: Start) -> None:
    environments = start()
    service = EpisodeService(environments, Supervisor(lambda: None, lambda: 0.0), lambda: 0.0)
    request = asked(service, 4)
    [first] = answers(service)
    assert isinstance(first, Continued)
    assert first.request.begun is not None
    for calls in environments.replacing(0):
        gather(calls)
    assert service.answer(1, first.request, completed(4, first.request.begun)) is None
    assert answers(service) == [Continued(request, team=1)]


def test_episodes_are_shared_out_and_stay_and_one_process_that_dies_takes_its_own_alone(start: Start) -> None:
    environments, supervisor = start(workers=2), Supervisor(lambda: None, lambda: 0.0)
    service = EpisodeService(environments, supervisor, lambda: 0.0)
    for sample in range(4):
        asked(service, sample)
    homes = [call.actor.name for call in service.calls]
    assert homes == [f"environment {sample % 2}" for sample in range(4)], "each went to the process with the fewest"
    begun = {each.request.number: each.request for each in answers(service) if isinstance(each, Continued)}
    os.kill(pids(environments)[1], signal.SIGKILL)
    environments.places = [Place({"num_cpus": 1000})] * 2
    later = {number: service.answer(1, begun[number], completed(number, begun[number].begun)) for number in (3, 0, 2)}
    assert set(later.values()) == {None}
    found = {each.request.number: each.request for each in answers(service) if isinstance(each, Continued)}
    assert found[3].begun is None, "its process died"
    for other in (0, 2):
        after, before = found[other].begun, begun[other].begun
        assert after is not None
        assert before is not None
        assert after.tokens[: len(before.tokens) + 1] == (*before.tokens, 8), "an episode of others goes on"
    at_once = service.answer(1, begun[1], completed(1, begun[1].begun))
    assert at_once == Continued(replace(begun[1], begun=None), 1), "nobody is asked for what is known to be lost"
    asked(service, 3)
    assert [call.actor.name for call in service.calls] == ["environment 0"], "a process without a place is left out"
    assert len(answers(service)) == 1
    assert (service.patience(), supervisor.replaced) == (WATCH_S, 0)
    service.drop()
    asked(service, 9)
    assert len(answers(service)) == 1
