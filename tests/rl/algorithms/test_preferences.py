"""Comparisons come from files or verdicts, no prompt is on both sides, and a policy or a reward model learns them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.data.preferences import RankedTokens
from lockstep.data.tasks.problem import Problem
from lockstep.distributed.layout import Layout
from lockstep.model.training.config import OptimizerConfig, TrainerConfig
from lockstep.rl.algorithms.config import PreferenceConfig
from lockstep.rl.algorithms.preferences import Comparison, TooFewComparisons, apart, by_verdict, samples_to_compare
from lockstep.rl.learner import Models
from lockstep.rl.remote import gather
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.types import Judged, Prompt, Rollout
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.workers.worker_groups import ModelGroup
from tests.rl.conftest import Actors


def judged(outcome: Outcome, *tokens: int) -> Judged:
    prompt = Prompt(3, "p", (1, 2), "")
    return Judged(
        Rollout(0, tokens, (0.0,) * len(tokens), "", "stop", (0,) * len(tokens), prompt=prompt), Verdict(outcome)
    )


def test_pairs_are_of_distinct_completions_that_were_graded() -> None:
    right, wrong, unknown = Outcome.correct, Outcome.incorrect, Outcome.ungradable
    group = [judged(wrong, 5), judged(right, 6), judged(unknown, 7), judged(right, 6), judged(wrong), judged(wrong, 8)]
    assert by_verdict([group], pairs=4) == [Comparison(RankedTokens(3, (1, 2), ((6,), (5,))))]
    group.append(judged(right, 9))
    assert [c.ranked.completions for c in by_verdict([group, group[:1]], pairs=4)] == [((6,), (5,)), ((9,), (8,))]
    assert len(by_verdict([group], pairs=1)) == 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 8), st.integers(0, 3))
def test_no_prompt_is_on_both_sides(prompts: list[int], held_out: int, seed: int) -> None:
    comparisons = [Comparison(RankedTokens(i, (prompt,), ((1,), (2,)))) for i, prompt in enumerate(prompts)]
    try:
        train, kept = apart(comparisons, held_out, seed)
    except TooFewComparisons:
        assert held_out > 0
        return
    assert sorted(c.ranked.index for c in [*train, *kept]) == list(range(len(prompts)))
    assert len(kept) >= min(held_out, len(prompts))
    assert not {c.ranked.prompt for c in train} & {c.ranked.prompt for c in kept}


def test_a_batch_weighs_every_comparison_alike() -> None:
    chosen = [
        Comparison(RankedTokens(0, (1,), ((4, 5), (6,)))),
        Comparison(RankedTokens(1, (1,), ((7,), (8,), (9, 9)))),
    ]
    samples = samples_to_compare(chosen, judged=False)
    assert [(s.group, s.preference) for s in samples] == [(0, 2.0), (0, 1.0), (1, 3.0), (1, 2.0), (1, 1.0)]
    assert all(np.all(s.weight == 0.5) for s in samples)


@pytest.fixture(scope="module")
def likes_fours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preferences for "4" over "3", whatever the sum."""
    rows = [{"prompt": f"What is {a} + {b}?", "chosen": "4", "rejected": "3"} for a in range(10) for b in range(a)]
    file = tmp_path_factory.mktemp("preferences") / "fours.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def learn(actors: Actors, models: Models, config: PreferenceConfig) -> list[dict[str, float]]:
    problems = [Problem(i, f"What is {i} + 1?", "4") for i in range(8)]
    controller = actors.controller(problems, held_out=2, models=models)
    return [record.metrics for record in controller.prefer(config, controller.compare(config))]


def a_recipe(source: Path, method: str) -> PreferenceConfig:
    return PreferenceConfig.model_validate(
        {"method": method, "steps": 8, "groups_per_step": 8, "source": str(source), "held_out": 8, "evaluate_every": 4}
        | {"optimizer": {"learning_rate": 3e-3}}
    )


@pytest.mark.parametrize(("method", "at_start"), [("dpo", np.log(2)), ("ipo", 25.0)])
def test_a_policy_learns_preferences(method: str, at_start: float, likes_fours: Path, actors: Actors) -> None:
    before = actors.rollouts.version
    found = learn(actors, Models(), a_recipe(likes_fours, method))
    assert found[0]["loss"] == pytest.approx(at_start, rel=1e-5), "the policy is its own reference at first"
    assert found[-1]["loss"] < found[0]["loss"]
    assert [step for step, metrics in enumerate(found, 1) if "held_out_accuracy" in metrics] == [4, 8]
    assert found[-1]["held_out_accuracy"] == 1
    assert actors.rollouts.version == before + 1, "the rollout workers have the weights"


def test_a_reward_model_learns_preferences(likes_fours: Path, actors: Actors) -> None:
    judge = ModelGroup(Layout(), threads=1, trainer=TrainerConfig(row_tokens=256), role="reward")
    gather(judge.start(actors.checkpoint, "float32", OptimizerConfig(), 1.0, "fast", "value"))
    try:
        before = actors.rollouts.version
        found = learn(actors, Models(reward=judge), a_recipe(likes_fours, "reward_model"))
    finally:
        for worker in judge.workers:
            worker.end()
    assert found[0]["loss"] == pytest.approx(np.log(2), rel=1e-5), "a new head tells nothing apart"
    assert found[-1]["held_out_accuracy"] == 1
    assert actors.rollouts.version == before, "the policy is as it was"


def test_too_few_comparisons_are_refused(actors: Actors) -> None:
    config = PreferenceConfig(prompts=4, completions=2, held_out=32, sampling=SamplingParams(max_new_tokens=6))
    with pytest.raises(TooFewComparisons, match=r"preference\.held_out=32 keeps all of them"):
        learn(actors, Models(), config)
