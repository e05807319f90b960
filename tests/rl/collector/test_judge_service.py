"""Completions are judged by the verifier that has the least to do, and again where it died."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lockstep.rl.collector.judge_service import FAILURES, JudgeService
from lockstep.rl.collector.supervisor import Supervisor
from lockstep.rl.remote import WorkerFailed, any_of, gather
from lockstep.rl.types import Prompt, Rollout
from lockstep.rl.verdict import Outcome
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.workers.stubs import VerifierWorker
from lockstep.rl.workers.worker_groups import VerifierGroup
from tests.rl.conftest import Actors
from tests.rl.verifiers.llm_judge.scripted_endpoint import says, scripted


def rollout(sample: int, text: str, answer: str = "4") -> Rollout:
    prompt = Prompt(index=sample, text="", tokens=(1,), answer=answer)
    return Rollout(
        prompt=prompt, sample=sample, tokens=(2,), logp=(-1.0,), weight_versions=(0,), text=text, finish_reason="stop"
    )


@pytest.fixture
def verifiers(actors: Actors) -> Iterator[VerifierGroup]:
    """Two verifier workers on the cluster that tests share."""
    group = VerifierGroup(VerifierConfig(workers=2))
    gather(group.start())
    yield group
    group.close()
    for worker in group.workers:
        worker.end()


def test_what_a_dead_verifier_had_is_judged_again(verifiers: VerifierGroup) -> None:
    supervisor = Supervisor(lambda: None, lambda: 0.0)
    service = JudgeService(verifiers, supervisor)
    os.kill(gather([verifiers.workers[0].call(VerifierWorker.pid)])[0], signal.SIGKILL)
    for sample in range(4):
        service.judge([rollout(sample, str(3 + sample % 2))])
    workers = [call.actor for call in service.calls]
    assert workers.count(verifiers.workers[0]) == workers.count(verifiers.workers[1]) == 2
    found: dict[int, Outcome] = {}
    while service.calls or service.is_short:
        service.replace()
        for call in any_of(list(service.calls), 0.1):
            found |= {judged.sample: verdict.outcome for judged, verdict in service.take(call)}
    assert found == {n: Outcome.correct if n % 2 else Outcome.incorrect for n in range(4)}
    assert supervisor.replaced == 1


class Poison(str):
    """An answer that nobody else can read."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("no number",)


def judged(service: JudgeService) -> dict[int, tuple[Outcome, str]]:
    found: dict[int, tuple[Outcome, str]] = {}
    while service.calls:
        for call in any_of(list(service.calls)):
            found |= {each.sample: (verdict.outcome, verdict.reason) for each, verdict in service.take(call)}
    return found


def test_a_completion_at_which_verifiers_raise_is_ungradable_and_its_neighbours_are_judged(
    verifiers: VerifierGroup,
) -> None:
    service = JudgeService(verifiers, Supervisor(lambda: None, lambda: 0.0))
    service.judge([rollout(0, "4"), rollout(1, "4", Poison("4")), rollout(2, "5")])
    found = judged(service)
    assert (found[0][0], found[2][0]) == (Outcome.correct, Outcome.incorrect)
    assert found[1][0] is Outcome.ungradable
    assert found[1][1].startswith("its verifier raised, twice: ")
    assert "no number" in found[1][1]


def test_an_llm_judge_that_is_away_makes_completions_ungradable_and_ends_no_run(
    actors: Actors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_TEST", "sk-secret")
    with scripted(says("SCORE: 5")) as server:
        config = server.config(api_key_env="KEY_OF_TEST", patience_s=1.0)
        group = VerifierGroup(VerifierConfig(llm_judge=config), reward_functions={"": {"style": "llm_judge"}})
        service = JudgeService(group, Supervisor(lambda: None, lambda: 0.0))
        graded = replace(rollout(0, "4"), prompt=replace(rollout(0, "4").prompt, grader="llm_judge"))
        try:
            service.judge([graded])
            (call,) = service.calls
            assert [dict(verdict.terms) for _, verdict in service.take(call)] == [{"style": 0.5}]
            assert server.keys == ["Bearer sk-secret"]
            server.end()
            service.judge([replace(graded, sample=n, text=f"other {n}") for n in range(FAILURES + 2)])
            found = judged(service)
        finally:
            for worker in group.workers:
                worker.end()
    assert [outcome for outcome, _ in found.values()] == [Outcome.ungradable] * (FAILURES + 2)
    assert all("cannot be reached" in reason for _, reason in found.values())


def test_verifiers_that_only_raise_end_the_run(verifiers: VerifierGroup) -> None:
    service = JudgeService(verifiers, Supervisor(lambda: None, lambda: 0.0))
    service.judge([rollout(n, "4", Poison("4")) for n in range(FAILURES + 1)])
    with pytest.raises(WorkerFailed, match="no number"):
        judged(service)
