"""Recipes with models beside the policy run from start to end, each role where and split as it was said."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lockstep.model.formats.lockstep import write_checkpoint
from lockstep.model.formats.registry import open_model
from lockstep.model.weights.initialization import RandomWeights
from tests.cluster.cli_process import Command, Train, metrics, overrides, refused, write_recipe
from tests.cluster.heads import free_port, joined, started

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A model of the tiny one's shape that scores at random."""
    opened = open_model(str(tiny_folder))
    judge = opened.config.with_head("value")
    return write_checkpoint(RandomWeights(judge, seed=3), judge, opened.files, tmp_path_factory.mktemp("judge"))


def rows(run: Path, step: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = pq.read_table(run / "rollouts" / f"step-{step:06d}.parquet").to_pylist()
    return found


def test_ppo_with_a_critic_and_a_reward_model_runs(
    tmp_path: Path, tiny_folder: Path, reward_model: Path, train: Train
) -> None:
    settings = (
        "supervised.steps=2",
        "rl.method=ppo",
        "rl.kl_beta=0.05",
        "rl.epochs=2",
        "rl.proximal=trainer",
        f"roles.reward.source={reward_model}",
        "roles.reward.layout={tensor=2}",
        "roles.critic.layout={pipeline=2}",
        "roles.policy.cpus=1",
        'roles.rollout={place="apart",cpus=1}',
        "roles.critic.place=apart",
        "roles.critic.cpus=0.5",
        "rl.flow.release=true",
    )
    code, output = train(tmp_path / "log", write_recipe(tmp_path, tiny_folder), *settings)
    assert code == 0, output
    for line in metrics(tmp_path / "tiny", "rl"):
        assert line["critic_grad_norm"] > 0
        assert np.isfinite(line["value_loss"])
    rewards = [row["reward"] for row in rows(tmp_path / "tiny", 1)]
    assert len(set(rewards)) > 2, "the reward model says nothing"
    for words in ("[critic 1 step 0] info: ready", "[reward 1 step 0] info: ready"):
        assert words in output


def test_a_teacher_teaches(tmp_path: Path, tiny_folder: Path, train: Train) -> None:
    settings = ("supervised.steps=8", "rl.method=distill", f"roles.teacher.source={tiny_folder}")
    code, output = train(tmp_path / "log", write_recipe(tmp_path, tiny_folder), *settings, "rl.group_size=1")
    assert code == 0, output
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path / "tiny", "rl"))


def test_a_reference_apart_says_what_one_inside_does(tmp_path: Path, tiny_folder: Path, train: Train) -> None:
    kl = {}
    for name, place in (("inside", "together"), ("beside", "apart")):
        folder = tmp_path / name
        folder.mkdir()
        settings = ("supervised.steps=8", "rl.steps=3", "rl.kl_beta=0.1", "rl.optimizer.learning_rate=1e-3")
        recipe = write_recipe(folder, tiny_folder)
        code, output = train(folder / "log", recipe, *settings, f"roles.reference.place={place}")
        assert code == 0, output
        kl[name] = [line["kl"] for line in metrics(folder / "tiny", "rl")]
    assert kl["inside"][-1] > 1e-4
    assert kl["beside"] == pytest.approx(kl["inside"], abs=1e-5, rel=1e-3)


def test_a_cluster_that_is_too_small_is_named(tmp_path: Path, tiny_folder: Path, train: Train) -> None:
    settings = ("roles.policy.cpus=2", 'roles.rollout={place="apart",cpus=1}')
    code, output = train(tmp_path / "log", write_recipe(tmp_path, tiny_folder), *settings)
    assert code == 2
    assert "the roles need 5 CPU (policy 4, rollout 1) and the cluster has 4: place roles together" in output
    assert "[policy 0" not in output


def test_a_language_model_is_no_reward_model(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    said = refused("train", str(recipe), "--set", f"roles.reward.source={tiny_folder}")
    assert "has a vocabulary head, and that role needs a value head" in said


def test_a_reward_model_of_the_policys_own_completions_judges_in_ppo(
    tmp_path: Path, tiny_folder: Path, train: Train
) -> None:
    settings = (
        "preference.method=reward_model",
        "preference.steps=4",
        "preference.groups_per_step=4",
        "preference.prompts=32",
        "preference.completions=8",
        "preference.pairs=2",
        "preference.held_out=4",
        "preference.sampling.max_new_tokens=8",
        "rl.method=ppo",
    )
    code, output = train(tmp_path / "log", write_recipe(tmp_path, tiny_folder), *settings)
    assert code == 0, output
    run = tmp_path / "tiny"
    assert 0 <= metrics(run, "reward")[-1]["held_out_accuracy"] <= 1
    assert len({row["reward"] for row in rows(run, 1)}) > 2, "the reward model says nothing"
    assert open_model(str(run / "checkpoints" / "reward")).config.head == "value"


def test_dpo_on_the_policys_own_completions_runs(tmp_path: Path, tiny_folder: Path, train: Train) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    settings = ("preference.steps=4", "preference.groups_per_step=8", "preference.prompts=32", "preference.held_out=4")
    settings += ("preference.pairs=2", "preference.sampling.max_new_tokens=8", "preference.evaluate_every=2")
    code, output = train(tmp_path / "log", recipe, *settings, "preference.optimizer.learning_rate=1e-3", "rl.steps=0")
    assert code == 0, output
    lines = metrics(tmp_path / "tiny", "preference")
    assert lines[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert ["held_out_loss" in line for line in lines] == [False, True, False, True]
    stages = [line["stage"] for line in metrics(tmp_path / "tiny", "eval")]
    assert stages == ["before", "supervised", "preferred"]


def test_preferences_and_text_are_not_in_one_recipe(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    said = refused("train", str(recipe), "--set", "preference.method=reward_model", "--set", "pretrain.steps=1")
    assert "with [supervised], [preference] and [rl]" in said


def test_rollout_workers_of_another_node_get_weights_by_broadcasts(tmp_path: Path, tiny_folder: Path) -> None:
    settings = (
        "supervised.steps=4",
        "rl.steps=3",
        "roles.policy.cpus=2",
        'roles.rollout={place="apart",cpus=2}',
        "rollout.workers=2",
        "rl.optimizer.learning_rate=1e-3",
    )
    figures = []
    for name, transport in (("auto", "auto"), ("memory", "memory")):
        folder = tmp_path / name
        folder.mkdir()
        recipe = write_recipe(folder, tiny_folder)
        given = overrides(*settings, f"rollout.transport={transport}")
        with started(free_port()) as head, joined(head, cpus=4):
            command = Command(folder / "log", "train", str(recipe), *given, RAY_ADDRESS=head.cluster)
            try:
                assert command.wait() == 0, command.output
            finally:
                command.kill()
        assert ("weights go to 2 processes by broadcasts" in command.output) == (transport == "auto")
        figures.append([(line["loss"], line["reward"]) for line in metrics(folder / "tiny", "rl")])
    assert figures[0] == figures[1]
