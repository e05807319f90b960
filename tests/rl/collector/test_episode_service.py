"""Episodes of a process that dies or stands still begin again, once, and none is lost or answered twice."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lockstep.rl.collector.episode_service import Continued, Ended, EpisodeService
from lockstep.rl.collector.supervisor import Supervisor
from lockstep.rl.environments.config import EnvironmentConfig
from lockstep.rl.remote import any_of, gather
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.output_processor import RolloutRequest
from lockstep.rl.types import Prompt, Rollout
from lockstep.rl.verdict import Outcome
from lockstep.rl.workers.base import Worker
from lockstep.rl.workers.worker_groups import EnvironmentGroup
from tests.rl.conftest import Actors


@pytest.fixture
def environments(actors: Actors) -> Iterator[EnvironmentGroup]:
    """Environments that ask on after every turn, in a process of their own."""
    config = EnvironmentConfig(kind="tests.rl.environments.episodes:Asking", turns=3, deadline=1.0)
    group = EnvironmentGroup(config, actors.tokenizer.files, chat=False)
    gather([group.ready()])
    yield group
    group.worker.end()


def begun(service: EpisodeService, sample: int, tokens: tuple[int, ...] = (7,)) -> RolloutRequest:
    prompt = Prompt(sample, "", (1, 2), "")
    request = RolloutRequest(sample, prompt.tokens, SamplingParams(max_new_tokens=50), seed=0)
    versions, logp = (0,) * len(tokens), (-1.0,) * len(tokens)
    service.begin(1, request, Rollout(sample, tokens, logp, "", "stop", versions, prompt=prompt))
    return request


def answers(service: EpisodeService) -> list[Continued | Ended]:
    found = []
    while service.calls:
        service.patience()
        found += [service.take(call) for call in any_of(list(service.calls), 0.1)]
    return found


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_episodes_begin_again_once_where_their_process_is_gone(
    sent: signal.Signals, environments: EnvironmentGroup
) -> None:
    now = [0.0]
    supervisor = Supervisor(lambda: None, lambda: now[0])
    service = EpisodeService(environments, supervisor, lambda: now[0])
    for attempt in range(2):
        os.kill(gather([environments.worker.call(Worker.pid)])[0], sent)
        requests = [begun(service, sample) for sample in range(3)]
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
    assert supervisor.replaced == 2
    begun(service, 3)
    [answer] = answers(service)
    assert isinstance(answer, Continued)
    assert answer.request.begun is not None, "and others go on in the new process"


def test_an_episode_whose_process_died_while_the_model_wrote_begins_again(environments: EnvironmentGroup) -> None:
    service = EpisodeService(environments, Supervisor(lambda: None, lambda: 0.0), lambda: 0.0)
    request = begun(service, 4)
    [first] = answers(service)
    assert isinstance(first, Continued)
    assert first.request.begun is not None
    environments.replace()
    grown = first.request.begun
    second = replace(grown, tokens=(*grown.tokens, 8), written=(*grown.written, True), logp=(*grown.logp, -1.0))
    second = replace(second, weight_versions=(*grown.weight_versions, 0), finish_reason="stop")
    service.begin(1, first.request, second.with_prompt(Prompt(4, "", (1, 2), "")))
    assert answers(service) == [Continued(request, team=1)]
