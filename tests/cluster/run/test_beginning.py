"""A run begins in a place of its own or goes on where it stopped, with what may change changed and written down."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from lockstep.cluster.launch import ray_session
from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.launch.preflight import CheckedRun
from lockstep.cluster.launch.ray_session import NoCluster
from lockstep.cluster.launch.run_lock import RunLocked, locked
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import load_recipe, to_toml
from lockstep.cluster.recipe.model_source import starting_point
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.records.run_folder import RunError, RunFolder
from lockstep.cluster.run.beginning import prepare
from lockstep.cluster.run.train import train_recipe
from lockstep.data.corpus.synthetic import write_random_store
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.reshard import chunks_of
from lockstep.distributed.checkpoint.saver import Saver
from tests.cluster.cli_process import write_recipe
from tests.cluster.heads import free_port

RECIPE = Path(__file__).parents[3] / "recipes" / "parity-tiny.toml"


def checked(recipe: Recipe) -> CheckedRun:
    return CheckedRun(RunPlan.of(recipe), starting_point(recipe.model, recipe.seed), {})


def begin(recipe: Recipe, *, resume: bool = False) -> RunFolder:
    """A run's folder as a run opens it."""
    return prepare(checked(recipe), print, resume=resume).open()


def save(recipe: Recipe, run: RunFolder, step: int, /, **said: Any) -> None:
    """A checkpoint that holds little and says what a run's checkpoints say."""
    plan = RunPlan.of(recipe)
    model = starting_point(recipe.model, recipe.seed).config.model_dump(mode="json")
    tensors = {"w": torch.ones(3), "exp_avg/w": torch.ones(3)}
    chunks = [chunk for name, tensor in tensors.items() for chunk in chunks_of(tensor, name)]
    saver = Saver(plan.checkpoints, recipe.checkpoints)
    saver.save(step, chunks, plan.manifest(run.id) | {"model": model} | said, {})
    saver.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A small indexed dataset."""
    write_random_store(tmp_path / "text", vocabulary=251, tokens=2000, seed=0)
    return tmp_path / "text"


def pretraining(tmp_path: Path, *settings: str) -> Recipe:
    return load_recipe(RECIPE, [f"run={tmp_path}/run", "pretrain.steps=12", *settings])


AT = ("{tmp}/saves", "{tmp}/saves/{name}", "file://{tmp}/store/")


@pytest.mark.parametrize("at", AT)
def test_a_place_that_holds_another_runs_checkpoints_is_refused(at: str, tmp_path: Path) -> None:
    place = f"checkpoints.at={at.replace('{tmp}', str(tmp_path))}"
    recipe = pretraining(tmp_path, place, "checkpoints.keep_last=1")
    first = begin(recipe)
    first.close("finished")
    save(recipe, first, 100)
    with pytest.raises(
        RecipeError, match=rf"holds checkpoints of the run parity-tiny \(id {first.id}\): go on with it"
    ):
        begin(recipe)
    assert RunFolder.open(tmp_path / "run").id == first.id, "the good run was moved aside"
    assert begin(recipe, resume=True).id == first.id
    other = (
        begin(pretraining(tmp_path, place.replace("saves/", "saves-of-"), f"run={tmp_path}/other", "name=b"))
        if "{name}" in at
        else begin(pretraining(tmp_path, f"{place}2", f"run={tmp_path}/other"))
    )
    assert other.id != first.id
    assert manager.saved(recipe.saves).keys() == {100}


def test_a_place_inside_of_the_folder_moves_aside_with_it(tmp_path: Path) -> None:
    for at in ("", f"{tmp_path}/run/saves"):
        recipe = pretraining(tmp_path, f'checkpoints.at="{at}"')
        first = begin(recipe)
        save(recipe, first, 100)
        second = begin(recipe)
        assert second.id != first.id
        assert not manager.saved(recipe.saves)
        assert second.moved_aside is not None
        assert RunFolder.open(second.moved_aside).id == first.id


def test_checkpoints_of_one_run_and_the_folder_of_another_do_not_go_on(tmp_path: Path) -> None:
    recipe = pretraining(tmp_path, f"checkpoints.at={tmp_path}/saves")
    first = begin(recipe)
    save(recipe, first, 3)
    shutil.rmtree(tmp_path / "run")
    other = RunFolder.create(tmp_path / "run", to_toml(recipe), recipe.name)
    with pytest.raises(RunError, match=f"belongs to the run {first.id}, and .*/run holds the run {other.id}"):
        begin(recipe, resume=True)


@pytest.mark.parametrize("at", AT)
def test_a_run_whose_folder_is_gone_goes_on_from_its_checkpoints(at: str, tmp_path: Path) -> None:
    recipe = pretraining(tmp_path, f"checkpoints.at={at.replace('{tmp}', str(tmp_path))}")
    first = begin(recipe)
    rows = [{"stage": "before", "accuracy": 0.5, "step": 0}]
    save(recipe, first, 3, rows=rows)
    shutil.rmtree(tmp_path / "run")
    again = begin(recipe, resume=True)
    assert again.id == first.id
    assert again.summary()["rows"] == rows
    assert again.recipe() == to_toml(recipe)


def test_a_folder_that_holds_no_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    with pytest.raises(RunError, match="holds files that are not a run's"):
        prepare(checked(pretraining(tmp_path)), print, resume=False)


@pytest.mark.parametrize(
    ("setting", "key", "old", "new"),
    [
        ("pretrain.steps=20", "pretrain.steps", 12, 20),
        ("pretrain.steps=3", "pretrain.steps", 12, 3),
        ("pretrain.optimizer.learning_rate=0.5", "pretrain.optimizer.learning_rate", 1e-3, 0.5),
        ("pretrain.optimizer.schedule=linear", "pretrain.optimizer.schedule", "cosine", "linear"),
        ("pretrain.spikes.window=5", "pretrain.spikes.window", None, 5),
        ("layout.tensor=2", "layout.tensor", 1, 2),
        ("trainer.row_tokens=128", "trainer.row_tokens", 64, 128),
        ("checkpoints.keep_last=7", "checkpoints.keep_last", 0, 7),
    ],
)
def test_what_may_change_is_written_down(setting: str, key: str, old: object, new: object, tmp_path: Path) -> None:
    recipe = pretraining(tmp_path)
    save(recipe, begin(recipe), 3)
    changed = pretraining(tmp_path, setting)
    run = begin(changed, resume=True)
    assert run.recipe() == to_toml(changed)
    found = {line["key"]: line for line in RunFolder.open(run.path).summary()["changes"]}
    assert found[key]["new"] == new
    assert found[key]["step"] == 3
    assert old is None or found[key]["old"] == old
    save(changed, run, 4)
    assert len(begin(changed, resume=True).summary()["changes"]) == len(found), "a change is recorded once"


@pytest.mark.parametrize(
    ("setting", "key", "old", "new"),
    [
        ("model.dtype=bfloat16", "model.dtype", "float32", "bfloat16"),
        ("name=other", "name", "parity-tiny", "other"),
        ("seed=3", "seed", "0", "3"),
        ("pretrain.samples_per_step=3", "pretrain.samples_per_step", "16", "3"),
        ("pretrain.optimizer.kind=muon", "pretrain.optimizer.kind", "adamw", "muon"),
        ("pretrain.optimizer.beta2=0.5", "pretrain.optimizer.beta2", "0.95", "0.5"),
        ("pretrain.z_coefficient=0.1", "pretrain.z_coefficient", "0.0", "0.1"),
        ("trainer.trainable.tensors=biases", "trainer.trainable.tensors", "None", "biases"),
        ("pretrain.steps=2", "pretrain.steps", "3 steps of 12", "2: give 3 or more"),
    ],
)
def test_what_may_not_change_is_refused_with_both_values(
    setting: str, key: str, old: str, new: str, tmp_path: Path
) -> None:
    recipe = pretraining(tmp_path)
    save(recipe, begin(recipe), 3)
    with pytest.raises(RecipeError) as caught:
        begin(pretraining(tmp_path, setting), resume=True)
    for words in (key, old, new):
        assert words in str(caught.value)
    assert RunFolder.open(tmp_path / "run").recipe() == to_toml(recipe)


def test_data_is_known_by_its_content(store: Path, tmp_path: Path) -> None:
    def reading(path: Path) -> Recipe:
        blend = f'pretrain.data={{blend=[{{path="{path}"}}], length=16}}'
        return pretraining(tmp_path, blend)

    recipe = reading(store)
    save(recipe, begin(recipe), 3)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{store}{suffix}", f"{store}-moved{suffix}")
    moved = reading(Path(f"{store}-moved"))
    run = begin(moved, resume=True)
    assert [line["key"] for line in run.summary()["changes"]] == ["pretrain.data.blend[0].path"]
    tokens = np.fromfile(f"{store}-moved.bin", np.uint8)
    tokens[4] ^= 1
    tokens.tofile(f"{store}-moved.bin")
    with pytest.raises(RecipeError, match=r"pretrain\.data\.blend\[0\]\.path has another content \(digest \w{32}\)"):
        begin(reading(Path(f"{store}-moved")), resume=True)
    with pytest.raises(RecipeError, match=r"pretrain\.data\.length=16, and the recipe says 8"):
        begin(pretraining(tmp_path, f'pretrain.data={{blend=[{{path="{store}"}}], length=8}}'), resume=True)


RL = ("supervised.steps=4", "rl.steps=6", "checkpoints.every=2")


def problems(tmp_path: Path, model: Path, *settings: str) -> Recipe:
    return load_recipe(write_recipe(tmp_path, model), [*RL, *settings])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("rl.sampling.temperature=0.5",), ("rl.sampling.temperature=1.0", "says 0.5")),
        (("rl.group_size=8",), ("rl.group_size=4", "says 8")),
        (("rl.kl_beta=0.5",), ("rl.kl_beta=", "says 0.5")),
        (("task.train=16",), ("task.train=32", "says 16")),
        (("rollout.length=64",), ("rollout.length=128", "says 64")),
        (("supervised.steps=5",), ("supervised.steps=4", "says 5")),
        (("preference.steps=5",), ("preference.method=None", "says dpo")),
        (("rl.steps=1",), ("after 2 steps of 6", "rl.steps=1: give 2 or more")),
    ],
)
def test_what_rl_learns_from_stays(
    settings: Sequence[str], words: Sequence[str], tmp_path: Path, tiny_folder: Path
) -> None:
    recipe = problems(tmp_path, tiny_folder)
    save(recipe, begin(recipe), 6, position={"phase": "rl", "phase_step": 2})
    with pytest.raises(RecipeError) as caught:
        begin(problems(tmp_path, tiny_folder, *settings), resume=True)
    for each in words:
        assert each in str(caught.value)


def test_rl_goes_on_for_longer_elsewhere_and_with_other_engines(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = problems(tmp_path, tiny_folder)
    save(recipe, begin(recipe), 6, position={"phase": "rl", "phase_step": 2})
    changed = problems(tmp_path, tiny_folder, "rl.steps=9", "rl.optimizer.learning_rate=1e-3", "rollout.workers=3")
    found = {line["key"]: (line["old"], line["new"]) for line in begin(changed, resume=True).summary()["changes"]}
    assert found == {
        "rl.steps": (6, 9),
        "rl.optimizer.learning_rate": (1e-5, 1e-3),
        "rollout.workers": (1, 3),
    }


def test_problems_that_were_edited_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = problems(tmp_path, tiny_folder)
    save(recipe, begin(recipe), 6, position={"phase": "rl", "phase_step": 2})
    file = tmp_path / "problems.jsonl"
    file.write_text(file.read_text().replace("What is 1 + 0?", "What is 1 + 1?"))
    with pytest.raises(RecipeError, match=r"task\.generator has another content"):
        prepare(checked(load_recipe(tmp_path / "tiny.toml", RL)), print, resume=True)


def test_manifests_of_older_versions_are_compared_by_the_folders_recipe(tmp_path: Path) -> None:
    recipe = pretraining(tmp_path)
    run = begin(recipe)
    save(recipe, run, 3, recipe=None, run=None, data={})
    with pytest.raises(RecipeError, match="saved with seed=0, and the recipe says 3"):
        begin(pretraining(tmp_path, "seed=3"), resume=True)
    assert begin(recipe, resume=True).id == run.id


def test_a_start_that_fails_leaves_the_run_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "ANSWER_S", 0.2)
    recipe = pretraining(tmp_path)
    good = begin(recipe)
    good.close("finished")
    with pytest.raises(NoCluster):
        train_recipe(recipe, Console(quiet=True), address=f"127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="does not divide"):
        train_recipe(pretraining(tmp_path, "layout.tensor=3"), Console(quiet=True))
    with pytest.raises(RunLocked), locked(recipe.folder, recipe.saves):
        train_recipe(recipe, Console(quiet=True), resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["id"] == good.id
    assert RunFolder.open(tmp_path / "run").summary()["status"] == "finished"
