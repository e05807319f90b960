"""A run that was killed in any phase goes on to the weights of one that was not, to the bit, and to its figures."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.launch.preflight import last_checkpoint
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import load_recipe
from lockstep.cluster.recipe.model_source import starting_point
from lockstep.distributed.checkpoint.manager import Checkpoint, step_name
from lockstep.distributed.checkpoint.tensors import whole
from tests.cluster.cli_process import Command, Train, metrics, overrides, summary, until, write_recipe
from tests.cluster.heads import Head

pytestmark = pytest.mark.exhaustive
SETTINGS = ("supervised.steps=12", "rl.steps=8", "rl.kl_beta=0.05", "checkpoints.every=5", "rollout.workers=2")
RUNS = {
    "sampling": (*SETTINGS, "rl.flow.dynamic_sampling=true"),
    "critic, judge and average": (
        "supervised.steps=8",
        'preference={method="reward_model",steps=8,groups_per_step=4,prompts=24,completions=4,held_out=2}',
        "rl.steps=8",
        "rl.method=ppo",
        "rl.kl_beta=0.05",
        "rl.kl_target=0.002",
        'rl.reference={kind="average",decay=0.8}',
        "roles.critic.layout={pipeline=2}",
        "checkpoints.every=4",
        "checkpoints.keep_last=1",
    ),
    "pairs and versions": (
        "supervised.steps=8",
        'preference={method="dpo",steps=8,groups_per_step=4,prompts=24,completions=4,held_out=2}',
        "rl.steps=8",
        "rl.kl_beta=0.05",
        "rl.reference.every=3",
        "layout={data=2,zero=2}",
        "model.dtype=bfloat16",
        "checkpoints.every=4",
    ),
}
KILLED = [
    ("sampling", 5),
    ("sampling", 15),
    ("critic, judge and average", 12),
    ("critic, judge and average", 20),
    ("pairs and versions", 12),
    ("pairs and versions", 20),
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, train: Train) -> Callable[[str], Path]:
    """The folder of a run that nothing disturbed, by its name in RUNS."""

    @cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp("straight")
        code, output = train(folder / "log", write_recipe(folder, tiny_folder), *RUNS[name])
        assert code == 0, output
        return folder / "tiny"

    return run


@pytest.mark.parametrize(("name", "step"), KILLED)
def test_a_killed_run_goes_on_to_the_same_bits(
    name: str, step: int, straight: Callable[[str], Path], tmp_path: Path, tiny_folder: Path, train: Train, head: Head
) -> None:
    recipe, first = write_recipe(tmp_path, tiny_folder), straight(name)
    command = Command(tmp_path / "log", "train", str(recipe), *overrides(*RUNS[name]), RAY_ADDRESS=head.cluster)
    saves = tmp_path / "tiny" / "checkpoints"
    try:
        until(lambda: (saves / step_name(step) / "manifest.json").exists(), 250)
    finally:
        command.kill()
    last = Checkpoint(first).manifest["step"]
    assert Checkpoint(saves).manifest["step"] < last
    code, output = train(tmp_path / "log", recipe, *RUNS[name], options=("--resume",))
    assert code == 0, output
    assert "going on after step" in output
    same_checkpoints(Checkpoint(first), Checkpoint(saves))
    for beside in ("critic", "reward"):
        if (first / "checkpoints" / beside).exists():
            same_checkpoints(Checkpoint(first / "checkpoints" / beside), Checkpoint(saves / beside))
    for phase in ("sft", "preference", "reward", "rl"):
        one, other = ({m["step"]: figures(m) for m in metrics(run, phase)} for run in (first, tmp_path / "tiny"))
        assert one == other
    assert summary(first)["rows"] == summary(tmp_path / "tiny")["rows"]


def figures(line: dict[str, Any]) -> dict[str, Any]:
    """What a step reports that time has no part in."""
    chosen = ("loss", "grad_norm", "accuracy", "reward", "kl", "kl_beta", "value_loss", "weight_version")
    return {name: line[name] for name in chosen if name in line}


def same_checkpoints(first: Checkpoint, second: Checkpoint) -> None:
    assert first.manifest["step"] == second.manifest["step"]
    assert first.manifest.get("position") == second.manifest.get("position")
    assert first.tensors.keys() == second.tensors.keys()
    for name, entry in first.tensors.items():
        box = whole(tuple(entry["shape"]))
        np.testing.assert_array_equal(first.read(name, box), second.read(name, box), name)


def test_what_is_saved_is_all_that_a_run_has_learned(straight: Callable[[str], Path]) -> None:
    run = straight("critic, judge and average")
    saved = Checkpoint(run)
    assert any(name.startswith("reference/") for name in saved.tensors)
    assert saved.states
    assert saved.manifest["position"]["kl_beta"] not in (None, 0.05)
    assert Checkpoint(run / "checkpoints" / "critic").states
    assert not Checkpoint(run / "checkpoints" / "reward").states  # it has learned all that it will


def test_a_policy_without_its_critic_is_not_gone_on_with(
    straight: Callable[[str], Path], tmp_path: Path, tiny_folder: Path
) -> None:
    shutil.copytree(straight("critic, judge and average"), tmp_path / "tiny", symlinks=True)
    recipe = load_recipe(write_recipe(tmp_path, tiny_folder), RUNS["critic, judge and average"])
    model = starting_point(recipe.model, recipe.seed).config
    shutil.rmtree(tmp_path / "tiny" / "checkpoints" / "critic" / step_name(24))
    found = last_checkpoint(RunPlan.of(recipe), model)
    assert found is not None
    assert found.manifest["step"] == 20
    shutil.rmtree(tmp_path / "tiny" / "checkpoints" / "critic")
    with pytest.raises(RecipeError, match=r"holds no whole checkpoint .*of the critic beside it, it has no manifest"):
        last_checkpoint(RunPlan.of(recipe), model)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["rl.group_size=6"], "was saved with rl.group_size=4, and the recipe says 6"),
        (
            ["rl.optimizer.kind=muon", "supervised.optimizer.kind=muon"],
            "was saved with (rl|supervised).optimizer.kind=adamw, and the recipe says muon",
        ),
    ],
)
def test_another_run_is_not_gone_on_with(settings: list[str], sentence: str, straight: Callable[[str], Path]) -> None:
    recipe = load_recipe(straight("sampling").parent / "tiny.toml", [*SETTINGS, *settings])
    with pytest.raises(RecipeError, match=sentence):
        last_checkpoint(RunPlan.of(recipe), starting_point(recipe.model, recipe.seed).config)
