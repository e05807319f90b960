"""A run of supervised steps and RL that was killed goes on to the weights of one that was not, to the bit."""

from pathlib import Path

import numpy as np
import pytest

from lockstep.cluster.config import RecipeError, load_recipe
from lockstep.cluster.jobs import last_checkpoint
from lockstep.cluster.sources import starting_point
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.spec import whole
from tests.cluster.commands import Command, Train, metrics, overrides, summary, until, write_recipe
from tests.cluster.heads import Head

pytestmark = pytest.mark.exhaustive
SETTINGS = ("supervised.steps=12", "rl.steps=8", "rl.kl_beta=0.05", "checkpoints.every=5", "rollout.workers=2")
FLOWS = ("rl.flow.dynamic_sampling=true",)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, train: Train) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    code, output = train(folder / "log", write_recipe(folder, tiny_folder), *SETTINGS, *FLOWS)
    assert code == 0, output
    return folder / "tiny"


@pytest.mark.parametrize("killed_at", ["step-000005", "step-000015"])
def test_a_killed_run_goes_on_to_the_same_bits(
    killed_at: str, straight: Path, tmp_path: Path, tiny_folder: Path, train: Train, head: Head
) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    given = overrides(*SETTINGS, *FLOWS)
    command = Command(tmp_path / "log", "train", str(recipe), *given, RAY_ADDRESS=head.cluster)
    try:
        until(lambda: (tmp_path / "tiny" / "checkpoints" / killed_at / "manifest.json").exists(), 200)
    finally:
        command.kill()
    assert Checkpoint(tmp_path / "tiny").manifest["step"] < 20
    code, output = train(tmp_path / "log", recipe, *SETTINGS, *FLOWS, options=("--resume",))
    assert code == 0, output
    assert "going on after step" in output
    first, second = Checkpoint(straight), Checkpoint(tmp_path / "tiny")
    assert first.manifest["step"] == second.manifest["step"] == 20
    assert first.manifest["position"] == second.manifest["position"]
    assert first.tensors.keys() == second.tensors.keys()
    assert first.states
    for name, entry in first.tensors.items():
        box = whole(tuple(entry["shape"]))
        np.testing.assert_array_equal(first.read(name, box), second.read(name, box), name)
    for phase in ("sft", "rl"):
        runs = straight, tmp_path / "tiny"
        one, other = ({m["step"]: m["loss"] for m in metrics(run, phase) if "loss" in m} for run in runs)
        assert one == other
    assert summary(straight)["rows"] == summary(tmp_path / "tiny")["rows"]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("rl.group_size=6", "was saved with rl.group_size=4, and the recipe says 6"),
        ("rl.optimizer.kind=muon", "was saved with optimizer.kind=adamw, and the recipe says muon"),
    ],
)
def test_another_run_is_not_gone_on_with(setting: str, sentence: str, straight: Path, tiny_folder: Path) -> None:
    recipe = load_recipe(straight.parent / "tiny.toml", [*SETTINGS, setting])
    with pytest.raises(RecipeError, match=sentence):
        last_checkpoint(recipe, starting_point(recipe.model, recipe.seed)[1])
