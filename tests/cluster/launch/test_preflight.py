"""Preflight opens each model that a run starts from once, and hands all of them to those who start it."""

from pathlib import Path

import pytest

from lockstep.cluster.launch.preflight import check
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import load_recipe
from lockstep.model.formats import registry
from lockstep.model.formats.lockstep import write_checkpoint
from lockstep.model.formats.registry import Format, ModelContents, open_model
from lockstep.model.weights.initialization import RandomWeights
from tests.cluster.cli_process import write_recipe


@pytest.fixture
def reward_model(tmp_path: Path, tiny_folder: Path) -> Path:
    """A model of the tiny one's shape that scores at random."""
    opened = open_model(str(tiny_folder))
    judge = opened.config.with_head("value")
    return write_checkpoint(RandomWeights(judge, seed=3), judge, opened.files, tmp_path / "judge")


def test_each_model_is_opened_once(
    tmp_path: Path, tiny_folder: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def counting(known: Format) -> Format:
        def read(path: Path) -> ModelContents:
            opened.append(path)
            return known.read(path)

        return Format(known.name, known.title, known.recognises, read, known.root, known.in_stores)

    monkeypatch.setattr(registry, "FORMATS", tuple(map(counting, registry.FORMATS)))
    settings = ["rl.method=ppo", f"roles.reward.source={reward_model}"]
    checked = check(load_recipe(write_recipe(tmp_path, tiny_folder), settings))
    assert opened == [tiny_folder, reward_model]
    assert checked.start.config == open_model(str(tiny_folder)).config
    assert checked.scorers.keys() == {"reward"}
    assert checked.scorers["reward"].config.head == "value"
    assert list(checked.plan.models) == ["critic", "reward"]


def test_a_model_without_the_head_that_its_role_needs_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny_folder), [f"roles.reward.source={tiny_folder}"])
    with pytest.raises(RecipeError, match=r"roles\.reward\.source=.* has a vocabulary head, and that role needs a va"):
        check(recipe)
