"""A run's plan says who takes part, who is trained and what resuming needs, once for all who ask."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from lockstep.cluster.launch.plan import ModelRole, RunPlan
from lockstep.cluster.recipe.load import parse
from lockstep.distributed.layout import Layout
from lockstep.model.training.config import OptimizerConfig


def plan_of(**values: Any) -> RunPlan:
    return RunPlan.of(parse(values))


def test_every_model_has_its_layout_optimizer_and_head() -> None:
    plan = plan_of(
        layout={"data": 2},
        rl={"steps": 1, "method": "ppo", "kl_beta": 0.1, "sampling": {"temperature": 0.7}},
        roles={
            "critic": {"layout": {"tensor": 2, "pipeline": 2}, "optimizer": {"learning_rate": 2e-4}},
            "reference": {"place": "apart"},
            "reward": {"source": "judge"},
            "teacher": {"source": "teacher", "layout": {"tensor": 2}},
        },
        rollout={"workers": 3, "tensor": 2},
        verifier={"workers": 2},
    )
    assert plan.policy == ModelRole("policy", Layout(data=2), OptimizerConfig(), 0.7)
    assert list(plan.models.values()) == [
        ModelRole("critic", Layout(tensor=2, pipeline=2), OptimizerConfig(learning_rate=2e-4), head="value"),
        ModelRole("reference", Layout(data=2), temperature=0.7),
        ModelRole("reward", Layout(data=2), source="judge"),
        ModelRole("teacher", Layout(tensor=2), temperature=0.7, source="teacher"),
    ]
    assert plan.trained_models == ("critic",)
    assert plan.processes == {
        "policy": 2, "rollout": 6, "verifier": 2, "critic": 4, "reference": 2, "reward": 2, "teacher": 2
    }  # fmt: skip
    assert (plan.rollout_concurrency, plan.training_concurrency) == (6, 12)
    with pytest.raises(FrozenInstanceError):
        plan.policy = plan.models["critic"]  # type: ignore[misc]


def test_a_reward_model_that_is_trained_has_the_optimizer_and_the_policy_that_of_its_own_phases() -> None:
    supervised, preference = {"steps": 3, "optimizer": {"kind": "muon"}}, {"method": "reward_model", "steps": 5}
    plan = plan_of(supervised=supervised, preference=preference | {"optimizer": {"learning_rate": 0.5}})
    assert plan.policy.optimizer == OptimizerConfig(kind="muon")
    assert plan.models == {"reward": ModelRole("reward", Layout(), OptimizerConfig(learning_rate=0.5), head="value")}
    assert plan.trained_models == ("reward",)
    assert plan.steps_before_rl == 8
    assert plan_of(preference={"method": "dpo", "steps": 5}).trained_models == ()


def test_pretraining_has_the_policy_alone() -> None:
    plan = plan_of(layout={"data": 3}, pretrain={"steps": 1}, roles={"reward": {"source": "judge"}})
    assert plan.processes == {"policy": 3}
    assert plan.training_concurrency == 3
    assert plan.policy.optimizer == OptimizerConfig()


def test_one_more_checkpoint_is_kept_where_several_models_have_some() -> None:
    kept = {"checkpoints": {"every": 2, "keep_last": 3}}
    assert plan_of(**kept, rl={"steps": 1}).checkpoint_config.keep_last == 3
    assert plan_of(**kept, rl={"steps": 1, "method": "ppo"}).checkpoint_config.keep_last == 4


@pytest.mark.parametrize(
    ("values", "conditions"),
    [
        (
            {"pretrain": {"steps": 1, "samples_per_step": 4}},
            {"pretrain.optimizer.kind": "adamw", "pretrain.samples_per_step": 4},
        ),
        (
            {"rl": {"steps": 1, "group_size": 6, "prompts_per_step": 2}},
            {
                "optimizer.kind": "adamw",
                "supervised.problems_per_step": None,
                "rl.prompts_per_step": 2,
                "rl.group_size": 6,
            },
        ),
    ],
)
def test_resuming_needs_the_same_batches_seed_and_optimizer(values: Any, conditions: dict[str, Any]) -> None:
    plan = plan_of(seed=7, **values)
    assert {c.recipe_key: c.value for c in plan.resume_conditions} == {"seed": 7} | conditions
    assert plan.processes.keys() == {"policy"} | ({"rollout", "verifier"} if "rl" in values else set())
