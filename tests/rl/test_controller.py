"""Rollouts and learning take turns as the recipe says, no sample is older than it allows, and deaths lose nothing."""

import os
import signal
from collections.abc import Iterator

import pytest

from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.task import Split, TaskConfig
from lockstep.distributed.layout import Layout
from lockstep.model.training.config import OptimizerConfig, TrainerConfig
from lockstep.rl.algorithms.config import FlowConfig, ReferenceConfig, RLConfig, SupervisedConfig
from lockstep.rl.algorithms.rewards import FormatTerm, RewardConfig
from lockstep.rl.algorithms.samples import teaches
from lockstep.rl.controller import Controller, StepRecord
from lockstep.rl.learner import Models
from lockstep.rl.remote import ActorHandle, gather
from lockstep.rl.rollout.config import RolloutConfig, SamplingParams
from lockstep.rl.rollout.output_processor import RolloutRequest
from lockstep.rl.types import Prompt, Rollout, Scored
from lockstep.rl.workers.worker_groups import PASSES, ModelGroup, RolloutGroup
from tests.rl.conftest import Actors

GROUPS, SAMPLES = 3, 4
FLOWS = {
    "synchronous": FlowConfig(),
    "one_step_off": FlowConfig(mode="one_step_off"),
    "asynchronous": FlowConfig(mode="asynchronous", max_staleness=2),
}


def controller_of(
    actors: Actors, models: Models, task: TaskConfig | None = None, reward: RewardConfig | None = None
) -> Controller:
    """Over sums whose answers are one of two digits."""
    pairs = [(a, b) for a in range(8) for b in range(a)]
    problems = [Problem(i, f"What is {a} + {b}?", str(3 + (a + b) % 2)) for i, (a, b) in enumerate(pairs)]
    return Controller(
        actors.policy,
        actors.rollouts,
        actors.verifiers,
        tokenizer=actors.tokenizer,
        task=task or TaskConfig(),
        split=Split(tuple(problems[4:]), tuple(problems[:4]), ""),
        seed=0,
        reward=reward or RewardConfig(),
        models=models,
    )


@pytest.fixture(scope="module")
def controller(actors: Actors) -> Controller:
    """Over a policy that writes one of two digits, of which one is right, after a few supervised steps."""
    made = controller_of(actors, Models())
    tuned = SupervisedConfig(steps=16, problems_per_step=8, optimizer=OptimizerConfig(learning_rate=3e-3))
    for _ in made.supervised(tuned):
        pass
    return made


def config(flow: FlowConfig, steps: int = 5) -> RLConfig:
    sampling = SamplingParams(max_new_tokens=6)
    return RLConfig(steps=steps, prompts_per_step=GROUPS, group_size=SAMPLES, flow=flow, sampling=sampling)


@pytest.mark.usefixtures("controller")
def test_a_stop_text_of_the_task_ends_what_is_judged_on_both_sides(actors: Actors) -> None:
    empty = FormatTerm(weight=0.5, pattern=r"\s*")
    made = controller_of(actors, Models(), TaskConfig(stop=["4"]), RewardConfig(correctness=2.0, format=empty))
    [record] = made.reinforce(config(FlowConfig(), steps=1))
    drawn = 0
    for scored in record.scored:
        text, stop, _ = actors.tokenizer.decode(scored.rollout.tokens).partition("4")
        drawn += bool(stop)
        assert scored.rollout.text == text
        assert scored.reward == 2.0 * (scored.verdict.reward or 0) + 0.5 * (not text.strip())
    assert drawn
    assert not any("4" in scored.rollout.text for scored in made.evaluate(6))
    assert record.metrics["reward/format"] > 0
    assert record.metrics["reward"] == pytest.approx(
        record.metrics["reward/format"] + record.metrics["reward/correctness"]
    )


def groups(record: StepRecord) -> list[list[Scored]]:
    return [list(record.scored[i : i + SAMPLES]) for i in range(0, len(record.scored), SAMPLES)]


def learned_with(record: StepRecord) -> int:
    """The version that learned from a step's samples."""
    return int(record.metrics["weight_version"]) - ("grad_norm" in record.metrics)


def check_samples(records: list[StepRecord]) -> None:
    """Every sample comes once, in order, with a version and a log-probability for each of its tokens."""
    rollouts = [s.rollout for record in records for s in record.scored]
    assert [r.sample for r in rollouts] == list(range(len(rollouts)))
    for rollout in rollouts:
        assert len(rollout.tokens) == len(rollout.logp) == len(rollout.weight_versions) > 0
        assert list(rollout.weight_versions) == sorted(rollout.weight_versions)


@pytest.mark.parametrize("mode", FLOWS)
def test_no_sample_is_older_than_its_flow_allows(mode: str, controller: Controller) -> None:
    records = list(controller.reinforce(config(FLOWS[mode])))
    check_samples(records)
    assert any("grad_norm" in record.metrics for record in records), "RL had nothing to learn from"
    for record in records:
        ages = [learned_with(record) - s.rollout.weight_version for s in record.scored]
        assert 0 <= max(ages) <= FLOWS[mode].staleness
        assert record.metrics["staleness_max"] == max(ages)
    ages = [int(record.metrics["staleness_max"]) for record in records]
    assert max(ages) == FLOWS[mode].staleness, "the bound was never reached"
    if FLOWS[mode].in_waves:
        for record in records:
            assert all(len(set(s.rollout.weight_versions)) == 1 for s in record.scored), "weights changed within a wave"


def test_groups_that_teach_nothing_are_replaced(controller: Controller) -> None:
    records = list(controller.reinforce(config(FlowConfig(dynamic_sampling=True, most=6.0))))
    check_samples(records)
    for record in records:
        teaching = sum(teaches(group, config(FlowConfig())) for group in groups(record))
        assert record.metrics["replaced_groups"] == record.metrics["skipped_groups"] == len(groups(record)) - teaching
        assert teaching == GROUPS or len(groups(record)) == 6 * GROUPS
    assert sum(record.metrics["replaced_groups"] for record in records) > 0


def kill(member: ActorHandle) -> None:
    os.kill(gather([member.call("pid")])[0], signal.SIGKILL)


def killing(records: Iterator[StepRecord], actors: Actors) -> Iterator[StepRecord]:
    """A run in which a rollout worker dies after the first step, and a verifier after the second."""
    for step, record in enumerate(records):
        yield record
        if step < 2:
            kill([actors.rollouts.teams[0][0], actors.verifiers.workers[0]][step])


@pytest.mark.parametrize(
    "mode", ["asynchronous", *(pytest.param(m, marks=pytest.mark.exhaustive) for m in ("synchronous", "one_step_off"))]
)
def test_workers_that_die_are_replaced_and_nothing_is_lost(mode: str, controller: Controller, actors: Actors) -> None:
    records = list(killing(controller.reinforce(config(FLOWS[mode])), actors))
    assert len(records) == 5
    check_samples(records)
    assert records[-1].metrics["replaced_workers"] - records[0].metrics["replaced_workers"] == 2
    for record in records:
        assert max(learned_with(record) - s.rollout.weight_version for s in record.scored) <= FLOWS[mode].staleness


def test_weights_that_were_given_back_come_again_when_nothing_was_learned(actors: Actors) -> None:
    made = controller_of(actors, Models(), reward=RewardConfig(correctness=0.0))
    records = list(made.reinforce(config(FlowConfig(release=True), steps=3)))
    check_samples(records)
    assert not any("grad_norm" in record.metrics for record in records)
    assert made.evaluate(4), "and a phase ends with weights"


def test_a_critic_learns_beside_the_policy_in_several_updates_a_step(controller: Controller, actors: Actors) -> None:
    critic = ModelGroup(Layout(), threads=1, trainer=TrainerConfig(row_tokens=256), role="critic")
    gather(critic.start(actors.checkpoint, "float32", OptimizerConfig(), 1.0, "fast", "value"))
    rate = OptimizerConfig(learning_rate=3e-3)
    teacher = ReferenceConfig(kind="average", decay=0.5)
    ppo = RLConfig(
        method="ppo",
        steps=6,
        prompts_per_step=8,
        group_size=2,
        kl_beta=0.01,
        epochs=2,
        minibatches=2,
        proximal="trainer",
        reference=teacher,
        optimizer=OptimizerConfig(learning_rate=1e-5),
        sampling=SamplingParams(max_new_tokens=6),
    )
    taught = controller_of(actors, Models(critic=critic, critic_optimizer=rate))
    records = list(taught.reinforce(ppo))
    check_samples(records)
    for record in records:
        assert record.metrics["critic_grad_norm"] > 0
        for scored in record.scored:
            known = scored.estimates
            lengths = [len(column) for column in (known.value, known.reference_logp, known.proximal_logp)]
            assert lengths == [len(scored.rollout.tokens)] * 3
            # Synchronous: the policy that wrote the tokens is the one that the trainer has before the step.
            assert known.proximal_logp == pytest.approx(scored.rollout.logp, abs=1e-4)
    first, last = records[0], records[-1]
    assert all(value == 0 for scored in first.scored for value in scored.estimates.value), "the head is 0 at first"
    assert first.scored[0].estimates.reference_logp == pytest.approx(first.scored[0].rollout.logp, abs=1e-4)
    assert last.scored[0].estimates.reference_logp != pytest.approx(last.scored[0].rollout.logp, abs=1e-4)
    assert last.metrics["value_loss"] < first.metrics["value_loss"]


def test_evaluation_is_greedy_and_in_order(controller: Controller) -> None:
    first, second = controller.evaluate(4), controller.evaluate(4)
    assert [s.rollout.prompt.index for s in first] == [0, 1, 2, 3]
    assert [s.rollout.text for s in first] == [s.rollout.text for s in second]


@pytest.fixture(scope="module")
def teams(actors: Actors) -> Iterator[RolloutGroup]:
    """Two teams that get weights by broadcasts."""
    limits = RolloutConfig(workers=2, sequences=4, length=64, bucket_mib=0.05, transport="broadcast")
    rollouts = RolloutGroup(limits, threads=1)
    gather(rollouts.start(actors.checkpoint, "float32"))
    yield rollouts
    for number in range(2):
        rollouts.end(number)


def written(team: list[ActorHandle]) -> Rollout:
    """What a team writes, greedily."""
    tokens = (1, 5, 3, 8)
    prompt = Prompt(index=0, text="", tokens=tokens, answer="")
    orders = [RolloutRequest(0, prompt, SamplingParams(temperature=0, max_new_tokens=8), 0)]
    while True:
        found: list[Rollout] = gather([member.call("work", orders, PASSES) for member in team])[0]
        if found:
            return found[0]
        orders = []


def test_teams_get_weights_by_broadcasts_and_go_on_without_one_that_died(teams: RolloutGroup, actors: Actors) -> None:
    first, second = teams.teams
    assert teams.receive(actors.policy) == []
    assert written(first) == written(second)
    assert written(first).weight_version == 1
    kill(first[0])
    assert teams.receive(actors.policy) == [0]
    assert written(second).weight_version == 2
    teams.replace(0, actors.policy)
    assert written(teams.teams[0]) == written(second)
    assert teams.receive(actors.policy) == []
    assert [written(team).weight_version for team in teams.teams] == [3, 3]


def test_broadcasts_bring_what_shared_memory_does(teams: RolloutGroup, actors: Actors) -> None:
    for rollouts in (teams, actors.rollouts):
        assert rollouts.receive(actors.policy) == []
    one, other = written(teams.teams[1]), written(actors.rollouts.teams[0])
    assert (one.tokens, one.logp) == (other.tokens, other.logp)
