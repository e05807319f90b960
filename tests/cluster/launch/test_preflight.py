"""Preflight opens each model that a run starts from once, and hands all of them to those who start it."""

from pathlib import Path

import pytest

from lockstep.cluster.launch.data_digests import data_digests
from lockstep.cluster.launch.preflight import check
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import load_recipe, parse
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


def test_routing_replay_is_refused_for_a_model_without_experts(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny_folder), ["rollout.replay_routing=true"])
    with pytest.raises(ValueError, match="replay_routing=true is for a model with experts, and this one has none"):
        check(recipe)


def test_functions_of_the_users_are_loaded_and_their_arguments_compared(tmp_path: Path, tiny_folder: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def grade(completion, answer): ...\ndef strange(entry): ...\ndef keep(question): ...\n")
    recipe = write_recipe(tmp_path, tiny_folder)
    check(load_recipe(recipe, [f"task.grader={own}:grade", f"task.filter={own}:keep"]))
    for key, name, said in (
        ("task.grader", "nothing", "task.grader: .*own.py:nothing cannot be loaded"),
        ("task.filter", "grade", "task.filter: .*own.py:grade takes completion, and is called with question, answer"),
        ("task.grader", "strange", "task.grader: .*own.py:strange takes entry, and is called with completion, answer"),
    ):
        with pytest.raises(RecipeError, match=said):
            check(load_recipe(recipe, [f"{key}={own}:{name}"]))
    with pytest.raises(RecipeError, match=r"reward\.functions\[0\]\.function: .*own.py:strange takes entry"):
        check(load_recipe(recipe, [f'reward.functions=[{{function = "{own}:strange"}}]']))


def test_the_source_of_a_function_is_known_by_its_content(tmp_path: Path) -> None:
    for folder, factor in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text("from helper import factor\ndef f(tokens): return factor * tokens\n")
        (tmp_path / folder / "helper.py").write_text(f"factor = {factor}\n")
    first, moved, changed = (
        data_digests(parse({"reward": {"functions": [{"function": f"{tmp_path}/{folder}/own.py:f"}]}}))
        for folder in ("a", "b", "c")
    )
    assert first == moved
    assert first.keys() == changed.keys() == {"reward.functions[0].function"}
    assert first != changed
