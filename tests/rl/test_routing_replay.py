"""Steps of RL with routing replay: the policy computes with the experts of the rollouts, models beside it do not.

Policy, critic and learner are those of a run, in one process; the engine writes in bf16, and the policy learns in fp32,
so that routers disagree.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.data.packing import RowRules, rows_for_ranks
from lockstep.distributed.world.groups import Groups
from lockstep.model.formats.huggingface.reader import read_text_files
from lockstep.model.formats.lockstep import write_checkpoint
from lockstep.model.training.config import OptimizerConfig
from lockstep.model.training.forward import score
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.algorithms.config import RLConfig
from lockstep.rl.algorithms.estimates import columns, of_tokens, scores_of, with_experts, without_experts
from lockstep.rl.algorithms.rewards import Rewards
from lockstep.rl.learner import Learner, Models
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.loading import load_rollout_engine
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.types import Judged, Prompt, Rollout
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.workers.model_worker import ModelWorker
from tests.rl.rollout.test_routing_record import MODEL
from tests.rl.test_learner import LocalGroup, LocalWorker, ended

SAMPLES = 4
PROMPTS = [Prompt(i, "", tuple((7 * i + 3 * j) % 61 for j in range(5 + 9 * i)), "") for i in range(3)]


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = RandomWeights(MODEL, 3, deviation=0.3)
    return write_checkpoint(weights, MODEL, read_text_files(tiny_folder), tmp_path_factory.mktemp("experts"))


def worker_of(groups: Groups, checkpoint: Path, role: str, **options: Any) -> ModelWorker:
    log = logging.getLogger("lockstep")
    before = list(log.handlers), log.propagate, log.level
    worker = LocalWorker(role, groups)
    log.handlers, log.propagate, log.level = before
    worker.start("", 0, checkpoint, "float32", OptimizerConfig(), 1.0, **options)
    return worker


def written(groups: Groups, checkpoint: Path) -> list[Rollout]:
    engine, _ = load_rollout_engine(
        checkpoint, EngineConfig(length=64, cache_gib=0.01), dtype="bfloat16", groups=groups, records_routing=True
    )
    sampling = SamplingParams(max_new_tokens=12)
    return sorted(generate(engine, PROMPTS, sampling, samples=SAMPLES, seed=0), key=lambda rollout: rollout.sample)


def plain(worker: ModelWorker, rollouts: list[Rollout], *, replay: bool) -> np.ndarray:
    samples = of_tokens(rollouts)
    [rows] = rows_for_ranks(with_experts(samples, rollouts) if replay else samples, RowRules(budget=512))
    found = scores_of(rows, [each.numpy() for each in score(worker.stage, worker.groups, rows, 1.0)])
    return np.concatenate(columns([found], [len(r.tokens) for r in rollouts]))


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_the_policy_replays_and_nobody_else_does(method: str, groups: Groups, checkpoint: Path) -> None:
    policy = worker_of(groups, checkpoint, "policy")
    critic = worker_of(groups, checkpoint, "critic", head="value") if method == "ppo" else None
    rollouts = written(groups, checkpoint)
    chosen = RLConfig.model_validate(
        {
            "method": method,
            "kl_beta": 0.05,
            "kl_place": "reward",
            "proximal": "trainer",
            "minibatches": 3,
            "prompts_per_step": 3,
            "group_size": SAMPLES,
            "sampling": {"max_new_tokens": 12},
        }
    )
    assert {"proximal", "reference"} <= chosen.scores
    expected, own = plain(policy, rollouts, replay=True), plain(policy, rollouts, replay=False)
    assert np.abs(expected - own).max() > 1e-3
    values = plain(critic, rollouts, replay=False) if critic else None
    learner = Learner(LocalGroup(policy), Models(critic=LocalGroup(critic) if critic else None), ended, 0, Rewards())
    learner.enter(chosen)
    learner.begin(chosen)
    judged = [Judged(r, Verdict(Outcome.correct if r.sample % 2 else Outcome.incorrect)) for r in rollouts]
    groups_of = learner.rewarded([judged[i : i + SAMPLES] for i in range(0, len(judged), SAMPLES)], chosen)
    learned = learner.learn(1, groups_of, [True] * 3, chosen)
    estimates = [each.estimates for group in learned.groups for each in group]
    np.testing.assert_allclose(np.concatenate([e.proximal_logp for e in estimates]), expected, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([e.reference_logp for e in estimates]), own, atol=1e-6)
    if values is not None:
        np.testing.assert_allclose(np.concatenate([e.value for e in estimates]), values, atol=1e-6)
    assert 0 < learned.metrics["routing_differs"] < 0.5
    assert all(s.experts is r.experts for s, r in zip(learned.samples, rollouts, strict=True))
    assert all(s.experts is None for s in without_experts(learned.samples))


def test_without_records_nothing_is_replayed_or_measured() -> None:
    rollout = Rollout(0, (1, 2), (0.0, 0.0), "", "stop", (0, 0), prompt=PROMPTS[0])
    samples = of_tokens([rollout])
    assert with_experts(samples, [rollout]) is samples
    assert samples[0].experts is None
