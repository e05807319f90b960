"""A run's plan says who takes part, who is trained and what resuming needs, once for all who ask."""

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from lockstep.cluster.launch.plan import ModelRole, RunPlan
from lockstep.cluster.recipe.errors import RecipeError
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
        },
        rollout={"workers": 3, "tensor": 2},
        verifier={"workers": 2},
    )
    assert plan.policy == ModelRole("policy", Layout(data=2), OptimizerConfig(), 0.7)
    assert list(plan.models.values()) == [
        ModelRole("critic", Layout(tensor=2, pipeline=2), OptimizerConfig(learning_rate=2e-4), head="value"),
        ModelRole("reference", Layout(data=2), temperature=0.7),
        ModelRole("reward", Layout(data=2), source="judge"),
    ]
    assert plan.trained_models == ("critic",)
    assert plan.processes == {
        "policy": 2, "rollout": 6, "verifier": 2, "critic": 4, "reference": 2, "reward": 2
    }  # fmt: skip
    assert plan.computing_with("reward") == ("policy", "critic", "reference", "reward")
    played = plan_of(rl={"steps": 1}, environment={"kind": "tools", "workers": 3})
    assert played.processes == {"policy": 1, "rollout": 2, "verifier": 1, "environment": 3}
    assert played.computing_with("policy") == ("policy",)
    assert [plan.tensor_degree(role) for role in plan.processes] == [1, 2, 1, 2, 1, 1]
    with pytest.raises(FrozenInstanceError):
        plan.policy = plan.models["critic"]  # type: ignore[misc]


def test_a_teacher_is_in_processes_of_its_own() -> None:
    teacher = {"source": "teacher", "layout": {"tensor": 2}}
    plan = plan_of(rl={"method": "distill", "sampling": {"temperature": 0.7}}, roles={"teacher": teacher})
    assert plan.models == {"teacher": ModelRole("teacher", Layout(tensor=2), temperature=0.7, source="teacher")}


@pytest.mark.parametrize("method", ["dapo", "dr_grpo", "gspo", "grpo", "cispo"])
def test_without_kl_nobody_holds_a_reference(method: str) -> None:
    plan = plan_of(rl={"method": method})
    assert plan.models == {}
    assert plan.recipe.rl
    assert plan.recipe.rl.reference.kind == "none"
    apart = {"reference": {"place": "apart"}}
    assert list(plan_of(rl={"method": method, "kl_beta": 0.1}, roles=apart).models) == ["reference"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rl": {}, "roles": {"critic": {"optimizer": {"learning_rate": 0.1}}}}, "roles.critic has no effect"),
        ({"rl": {"kl_beta": 0.1}, "roles": {"teacher": {"source": "m"}}}, "roles.teacher has no effect"),
        ({"rl": {}, "roles": {"reference": {"place": "apart"}}}, "roles.reference has no effect"),
        ({"rl": {}, "roles": {"reward": {"layout": {"data": 2}}}}, "roles.reward has no effect"),
        ({"rl": {}, "roles": {"environment": {"place": "apart"}}}, "roles.environment has no effect"),
        ({"rl": {"method": "distill"}}, "set roles.teacher.source"),
        (
            {
                "rl": {"method": "distill", "kl_beta": 0.1},
                "roles": {"teacher": {"source": "m"}, "reference": {"place": "apart"}},
            },
            "place it together",
        ),
        ({"supervised": {"optimizer": {"kind": "muon"}}, "rl": {}}, "one optimizer for its policy"),
        ({"preference": {"optimizer": {"kind": "muon"}}, "rl": {}}, "one optimizer for its policy"),
        (
            {"model": {"dtype": "float32"}, "rl": {"optimizer": {"gradient_dtype": "bfloat16"}}},
            "no effect on a model in float32",
        ),
        ({"rl": {}, "reward": {"overlong": {"weight": 1.0}}}, "begins behind 16384 tokens"),
    ],
)
def test_roles_and_sections_that_have_no_effect_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        plan_of(**values)


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
    assert plan.computing_with("policy") == ("policy",)
    assert plan.policy.optimizer == OptimizerConfig()


def test_one_more_checkpoint_is_kept_where_several_models_have_some() -> None:
    kept = {"checkpoints": {"every": 2, "keep_last": 3}}
    assert plan_of(**kept, rl={"steps": 1}).checkpoint_config.keep_last == 3
    assert plan_of(**kept, rl={"steps": 1, "method": "ppo"}).checkpoint_config.keep_last == 4


def test_manifests_say_which_run_and_recipe_they_are_of() -> None:
    plan = plan_of(seed=7, name="mine", pretrain={"steps": 1, "samples_per_step": 4})
    said = plan.manifest("0123")
    assert (said["run"], said["name"], said["seed"], said["data"]) == ("0123", "mine", 7, {})
    assert parse(json.loads(json.dumps(said["recipe"]))) == plan.recipe
    assert plan.processes.keys() == {"policy"}
