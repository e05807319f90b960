"""Rollouts and learning take turns as the recipe says, no sample is older than it allows, and deaths lose nothing."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.task import TaskConfig
from lockstep.distributed.layout import Layout
from lockstep.model.training.config import OptimizerConfig, TrainerConfig
from lockstep.rl.algorithms.config import FlowConfig, ReferenceConfig, RLConfig
from lockstep.rl.algorithms.methods import Signal
from lockstep.rl.algorithms.rewards import CORRECTNESS, FormatTerm, RewardConfig, Rewards
from lockstep.rl.algorithms.samples import teaches
from lockstep.rl.algorithms.supervised import SupervisedConfig
from lockstep.rl.controller import Controller, StepRecord
from lockstep.rl.learner import Models
from lockstep.rl.remote import ActorHandle, gather
from lockstep.rl.rollout.config import RolloutConfig, SamplingParams
from lockstep.rl.rollout.output_processor import RolloutRequest
from lockstep.rl.types import Advantaged, Completion
from lockstep.rl.workers.base import Worker
from lockstep.rl.workers.stubs import RolloutWorker
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
    return actors.controller(problems, held_out=4, task=task, rewards=Rewards(reward or CORRECTNESS), models=models)


@pytest.fixture(scope="module")
def controller(actors: Actors) -> Controller:
    """Over a policy that writes one of two digits, of which one is right, after a few supervised steps."""
    made = controller_of(actors, Models())
    tuned = SupervisedConfig(steps=16, problems_per_step=8, optimizer=OptimizerConfig(learning_rate=3e-3))
    for _ in made.supervised(tuned):
        pass
    return made


def config(flow: FlowConfig, steps: int = 5, samples: int = SAMPLES) -> RLConfig:
    sampling = SamplingParams(max_new_tokens=6)
    return RLConfig(steps=steps, prompts_per_step=GROUPS, group_size=samples, flow=flow, sampling=sampling)


@pytest.mark.usefixtures("controller")
def test_a_stop_text_of_the_task_ends_what_is_judged_on_both_sides(actors: Actors) -> None:
    empty = FormatTerm(weight=0.5, pattern=r"\s*")
    made = controller_of(actors, Models(), TaskConfig(stop=["4"]), RewardConfig(correctness=2.0, format=empty))
    [record] = made.reinforce(config(FlowConfig(), steps=1))
    drawn = 0
    for each in record.completions:
        text, stop, _ = actors.tokenizer.decode(each.rollout.tokens).partition("4")
        drawn += bool(stop)
        assert each.rollout.text == text
        assert each.reward.total == 2.0 * (each.verdict.reward or 0) + 0.5 * (not text.strip())
    assert drawn
    assert not any("4" in each.rollout.text for each in made.evaluate(6))
    assert record.metrics["reward/format"] > 0
    assert record.metrics["reward"] == pytest.approx(
        record.metrics["reward/format"] + record.metrics["reward/correctness"]
    )


def groups(record: StepRecord, samples: int = SAMPLES) -> list[list[Advantaged]]:
    return [list(record.completions[i : i + samples]) for i in range(0, len(record.completions), samples)]


def learned_with(record: StepRecord) -> int:
    """The version that learned from a step's samples."""
    return int(record.metrics["weight_version"]) - ("grad_norm" in record.metrics)


def check_samples(records: list[StepRecord]) -> None:
    """Every sample comes once, in order, with a version and a log-probability for each of its tokens."""
    rollouts = [s.rollout for record in records for s in record.completions]
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
        ages = [learned_with(record) - s.rollout.weight_version for s in record.completions]
        assert 0 <= max(ages) <= FLOWS[mode].staleness
        assert record.metrics["staleness_max"] == max(ages)
    ages = [int(record.metrics["staleness_max"]) for record in records]
    assert max(ages) == FLOWS[mode].staleness, "the bound was never reached"
    if FLOWS[mode].in_waves:
        for record in records:
            versions = [s.rollout.weight_versions for s in record.completions]
            assert all(len(set(each)) == 1 for each in versions), "weights changed within a wave"


def test_groups_that_teach_nothing_are_replaced(controller: Controller) -> None:
    pairs = config(FlowConfig(dynamic_sampling=True, most=6.0), samples=2)  # of which at least half are equal
    records = list(controller.reinforce(pairs))
    check_samples(records)
    for record in records:
        found = groups(record, 2)
        teaching = sum(teaches(group, pairs) for group in found)
        assert record.metrics["replaced_groups"] == record.metrics["skipped_groups"] == len(found) - teaching
        assert teaching == GROUPS or len(found) == 6 * GROUPS
    assert sum(record.metrics["replaced_groups"] for record in records) > 0


@pytest.mark.usefixtures("controller")
def test_scores_of_a_reward_model_decide_which_groups_teach(actors: Actors) -> None:
    reward = ModelGroup(Layout(), threads=1, trainer=TrainerConfig(row_tokens=256), role="reward")
    gather(reward.start(actors.checkpoint, "float32", None, 1.0, "fast", "value"))
    made = controller_of(actors, Models(reward=reward))
    [record] = made.reinforce(config(FlowConfig(dynamic_sampling=True, most=2.0), steps=1))
    for each in record.completions:
        assert each.score == each.reward.total == each.advantage == 0, "the head is 0 at first"
    assert any(len({each.verdict.outcome for each in group}) > 1 for group in groups(record))
    assert record.metrics["replaced_groups"] == record.metrics["skipped_groups"] == 2 * GROUPS
    assert "grad_norm" not in record.metrics


def kill(member: ActorHandle[Worker]) -> None:
    os.kill(gather([member.call(Worker.pid)])[0], signal.SIGKILL)


def killing(records: Iterator[StepRecord], actors: Actors) -> Iterator[StepRecord]:
    """A run in which a rollout worker dies after the first step, and a verifier after the second."""
    for step, record in enumerate(records):
        yield record
        if step < 2:
            kill([actors.rollouts.teams[0][0], actors.verifiers.workers[0]][step])


def metrics_after(controller: Controller) -> dict[str, float]:
    """Those of a step that changes next to nothing."""
    still = config(FlowConfig(), steps=1).model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e-12)})
    [record] = controller.reinforce(still)
    return record.metrics


@pytest.mark.parametrize(
    "mode", ["asynchronous", *(pytest.param(m, marks=pytest.mark.exhaustive) for m in ("synchronous", "one_step_off"))]
)
def test_workers_that_die_are_replaced_and_nothing_is_lost(mode: str, controller: Controller, actors: Actors) -> None:
    records = list(killing(controller.reinforce(config(FLOWS[mode])), actors))
    assert len(records) == 5
    check_samples(records)
    for record in records:
        assert max(learned_with(record) - s.rollout.weight_version for s in record.completions) <= FLOWS[mode].staleness
    before = records[0].metrics["replaced_workers"]
    while (after := metrics_after(controller))["rollout_teams"] < 2 or after["replaced_workers"] < before + 2:
        pass  # other tests go on with these workers, whose start takes longer than a few steps
    assert after["replaced_workers"] == before + 2


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
        for each in record.completions:
            known = each.estimates
            lengths = [len(column) for column in (known.value, known.reference_logp, known.proximal_logp)]
            assert lengths == [len(each.rollout.tokens)] * 3
            # Synchronous: the policy that wrote the tokens is the one that the trainer has before the step.
            assert known.proximal_logp == pytest.approx(each.rollout.logp, abs=1e-4)
    first, last = records[0], records[-1]
    assert all(value == 0 for each in first.completions for value in each.estimates.value), "the head is 0 at first"
    assert first.completions[0].estimates.reference_logp == pytest.approx(first.completions[0].rollout.logp, abs=1e-4)
    assert last.completions[0].estimates.reference_logp != pytest.approx(last.completions[0].rollout.logp, abs=1e-4)
    later = [each for record in records[2:] for each in record.completions]
    missed = sum(float(np.square(np.subtract(each.estimates.value, each.reward.total)).sum()) for each in later)
    assert missed < sum(len(each.rollout.tokens) * each.reward.total**2 for each in later), (
        "no better than a value of 0"
    )


def test_evaluation_is_greedy_and_in_order(controller: Controller) -> None:
    first, second = controller.evaluate(4), controller.evaluate(4)
    assert [s.rollout.prompt.index for s in first] == [0, 1, 2, 3]
    assert [s.rollout.text for s in first] == [s.rollout.text for s in second]


def measuring(records: Iterator[StepRecord], controller: Controller) -> Iterator[StepRecord]:
    """A run with evaluations between its steps, which agree with each other where no weights came between."""
    for record in records:
        drawn = controller.sample(SamplingParams(max_new_tokens=4), samples=3)
        first, second = controller.evaluate(4), controller.evaluate(4)
        assert [s.rollout.prompt.index for s in first] == [0, 1, 2, 3] == [g[0].rollout.prompt.index for g in drawn]
        assert [s.rollout.tokens for s in first] == [s.rollout.tokens for s in second]
        assert [len(group) for group in drawn] == [3] * 4
        assert {s.rollout.weight_version for s in first} == {controller.version}
        yield record


def test_evaluation_between_steps_loses_nothing_of_an_asynchronous_run(controller: Controller) -> None:
    records = list(measuring(controller.reinforce(config(FLOWS["asynchronous"], steps=4)), controller))
    assert len(records) == 4
    check_samples(records)


@pytest.mark.parametrize("mode", ["synchronous", "one_step_off"])
def test_evaluation_between_steps_changes_no_bit_of_a_run(mode: str, controller: Controller) -> None:
    still = config(FLOWS[mode], steps=3).model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e-30)})
    plain = [each.rollout for record in controller.reinforce(still) for each in record.completions]
    measured = [
        each.rollout for record in measuring(controller.reinforce(still), controller) for each in record.completions
    ]
    assert [(r.sample, r.tokens, r.logp) for r in plain] == [(r.sample, r.tokens, r.logp) for r in measured]


@pytest.fixture(scope="module")
def teams(actors: Actors) -> Iterator[RolloutGroup]:
    """Two teams that get weights by broadcasts."""
    limits = RolloutConfig(workers=2, sequences=4, length=64, bucket_mib=0.05, transport="broadcast")
    rollouts = RolloutGroup(limits, threads=1)
    gather(rollouts.start(actors.checkpoint, "float32"))
    yield rollouts
    for number in range(2):
        rollouts.end(number)


def written(team: list[ActorHandle[RolloutWorker]]) -> Completion:
    """What a team writes, greedily."""
    tokens = (1, 5, 3, 8)
    requests = [RolloutRequest(0, tokens, SamplingParams(temperature=0, max_new_tokens=8), 0)]
    while True:
        found = gather([member.call(RolloutWorker.work, requests, PASSES) for member in team])[0]
        if found.completions:
            return found.completions[0]
        requests = []


def test_teams_get_weights_by_broadcasts_and_go_on_without_one_that_died(teams: RolloutGroup, actors: Actors) -> None:
    first, second = teams.teams
    assert teams.receive(actors.policy) == []
    assert written(first) == written(second)
    assert written(first).weight_version == 1
    kill(first[0])
    assert teams.receive(actors.policy) == [0]
    assert written(second).weight_version == 2
    for calls in teams.replacing(0):
        gather(calls)
    assert teams.fill(actors.policy, [0]) == []
    assert written(teams.teams[0]) == written(second)
    assert teams.receive(actors.policy) == []
    assert [written(team).weight_version for team in teams.teams] == [3, 3]


def test_broadcasts_bring_what_shared_memory_does(teams: RolloutGroup, actors: Actors) -> None:
    for rollouts in (teams, actors.rollouts):
        assert rollouts.receive(actors.policy) == []
    one, other = written(teams.teams[1]), written(actors.rollouts.teams[0])
    assert (one.tokens, one.logp) == (other.tokens, other.logp)


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "best"])
def test_rollouts_are_compared_by_rewards_less_their_kl(advantage: Signal, controller: Controller) -> None:
    chosen = RLConfig(
        advantage=advantage,
        kl_beta=0.5,
        kl_place="reward",
        kl_estimator="k1",
        reference=ReferenceConfig(kind="average", decay=0.9),
        steps=3,
        prompts_per_step=GROUPS,
        group_size=SAMPLES,
        flow=FlowConfig(dynamic_sampling=True, most=3.0),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        sampling=SamplingParams(max_new_tokens=6),
    )
    records = list(controller.reinforce(chosen))
    check_samples(records)
    learned = [record for record in records if "grad_norm" in record.metrics]
    assert learned, "RL had nothing to learn from"
    for group in (group for record in learned for group in groups(record)):
        rewards = [s.verdict.reward or 0.0 for s in group]
        costs = [0.5 * float(np.sum(np.float64(s.rollout.logp) - s.estimates.reference_logp)) for s in group]
        net = [reward - cost for reward, cost in zip(rewards, costs, strict=True)]
        mean = sum(net) / SAMPLES
        expected = {
            "grpo": [(n - mean) / (np.std(net) + 1e-6) for n in net],
            "dr_grpo": [n - mean for n in net],
            "rloo": [(n - mean) * SAMPLES / (SAMPLES - 1) for n in net],
            "reinforce_pp_baseline": [n - mean for n in net],
            "best": [1.0 if i == net.index(max(net)) and n > 0 else None for i, n in enumerate(net)],
        }[advantage]
        assert [s.advantage for s in group] == pytest.approx(expected, abs=1e-6)
