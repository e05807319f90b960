"""A run that was killed and goes on ends with the weights, and the optimizer, of one that was not, to the bit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.launch.preflight import last_checkpoint
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import load_recipe
from lockstep.cluster.recipe.model_source import starting_point
from lockstep.distributed.checkpoint.manager import Checkpoint, step_name
from lockstep.distributed.checkpoint.storage import storage_of
from lockstep.distributed.checkpoint.tensors import whole
from lockstep.model.weights.names import is_adapter
from tests.cluster.cli_process import Command, Train, metrics, overrides, summary, until
from tests.cluster.heads import Head

RECIPE = Path(__file__).parents[3] / "recipes" / "parity-tiny.toml"
STEPS = 12
SETTINGS = (
    f"pretrain.steps={STEPS}",
    "layout.data=2",
    "layout.zero=2",
    "checkpoints.every=3",
    "pretrain.evaluate_every=6",
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    code, output = train(folder / "log", RECIPE, f"run={folder}/run", *SETTINGS)
    assert code == 0, output
    return folder / "run"


def store_of(folder: Path) -> str:
    """A key-value store, in which nothing can be renamed."""
    return f"file://{folder}/store/"


def killed_after_a_checkpoint(folder: Path, head: Head) -> Path:
    """A run that saves into a key-value store, killed outright when its first checkpoint was there."""
    command = Command(
        folder / "log",
        "train",
        str(RECIPE),
        *overrides(f"run={folder}/run", f"checkpoints.at={store_of(folder)}", *SETTINGS),
        RAY_ADDRESS=head.cluster,
    )
    try:
        until(lambda: (folder / "store" / "step-000003" / "manifest.json").exists(), 120)
    finally:
        command.kill()
    assert Checkpoint(store_of(folder)).manifest["step"] < STEPS
    return folder / "run"


def check_equal(a: Path | str, b: Path | str) -> None:
    first, second = Checkpoint(a), Checkpoint(b)
    assert first.manifest["step"] == second.manifest["step"] == STEPS
    assert first.tensors.keys() == second.tensors.keys()
    assert len(first.states) == 2 * (len(first.tensors) - len(first.states))
    for name, entry in first.tensors.items():
        box = whole(tuple(entry["shape"]))
        np.testing.assert_array_equal(first.read(name, box), second.read(name, box), name)


def test_a_killed_run_goes_on_to_the_same_bits(straight: Path, tmp_path: Path, train: Train, head: Head) -> None:
    run = killed_after_a_checkpoint(tmp_path, head)
    settings = f"run={tmp_path}/run", f"checkpoints.at={store_of(tmp_path)}", *SETTINGS
    code, output = train(tmp_path / "log", RECIPE, *settings, options=("--resume",))
    assert code == 0, output
    assert "going on after step" in output
    check_equal(straight, store_of(tmp_path))
    steps = [m["step"] for m in metrics(run, "pretrain")]
    assert steps == list(range(1, STEPS + 1))
    one, other = ({m["step"]: (m["loss"], m["grad_norm"]) for m in metrics(r, "pretrain")} for r in (straight, run))
    assert one == other
    assert summary(run)["status"] == "finished"
    assert storage_of(store_of(tmp_path)).pointed("best") == (straight / "checkpoints" / "best").resolve().name


@pytest.mark.exhaustive
def test_a_run_in_a_store_goes_on_without_its_folder(straight: Path, tmp_path: Path, train: Train) -> None:
    shutil.copytree(straight / "checkpoints", tmp_path / "store", ignore=shutil.ignore_patterns("latest", "best"))
    longer = f"run={tmp_path}/run", f"checkpoints.at={store_of(tmp_path)}", *SETTINGS, f"pretrain.steps={STEPS + 2}"
    code, output = train(tmp_path / "log", RECIPE, *longer)
    assert (code, output.count("\n")) == (2, 1)
    assert (
        f"holds checkpoints of the run parity-tiny (id {summary(straight)['id']}): go on with it by --resume" in output
    )
    assert not (tmp_path / "run").exists()
    code, output = train(tmp_path / "log", RECIPE, *longer, options=("--resume",))
    assert code == 0, output
    assert f"from here on, pretrain.steps {STEPS} → {STEPS + 2}" in output
    run = tmp_path / "run"
    assert [m["step"] for m in metrics(run, "pretrain")] == [STEPS + 1, STEPS + 2]
    assert summary(run)["id"] == summary(straight)["id"] == Checkpoint(store_of(tmp_path)).manifest["run"]
    assert {"step": STEPS, "key": "pretrain.steps", "old": STEPS, "new": STEPS + 2} in summary(run)["changes"]  # type: ignore[operator]
    assert load_recipe(run / "recipe.toml") == load_recipe(RECIPE, longer)
    code, output = train(tmp_path / "log", RECIPE, f"run={run}", *SETTINGS, "roles.policy.gpus=1")
    assert (code, "the roles need 2 GPU" in output) == (2, True), output
    assert summary(run)["status"] == "finished", "a start that failed moved the run aside"
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("pretrain.optimizer.kind=muon", "was saved with pretrain.optimizer.kind=adamw, and the recipe says muon"),
        ("seed=3", "was saved with seed=0, and the recipe says 3"),
        ("model.config.layers=2", "was saved with model="),
    ],
)
def test_another_run_is_not_gone_on_with(setting: str, sentence: str, straight: Path) -> None:
    recipe = load_recipe(RECIPE, [f"run={straight}", *SETTINGS, setting])
    with pytest.raises(RecipeError) as caught:
        last_checkpoint(RunPlan.of(recipe), starting_point(recipe.model, recipe.seed).config)
    assert sentence in str(caught.value)


def test_a_run_that_saved_nothing_begins(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, [f"run={tmp_path}"])
    assert last_checkpoint(RunPlan.of(recipe), starting_point(recipe.model, recipe.seed).config) is None


HARM: dict[str, tuple[tuple[int, ...], str]] = {
    "the newest is emptied": (
        (12,),
        "step 12 is damaged: its manifest.json is damaged; step 9 is whole, and 3 steps are",
    ),
    "the two newest are emptied": (
        (12, 9),
        "step 9 is damaged: its manifest.json is damaged; step 6 is whole, and 6 st",
    ),
    "all but the oldest are emptied": ((12, 9, 6), "step 3 is whole, and 9 steps are taken again"),
}


@pytest.mark.parametrize("kind", HARM)
def test_damaged_checkpoints_are_passed_over_and_named(kind: str, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    emptied, sentence = HARM[kind]
    for step in emptied:
        for path in (tmp_path / "run" / "checkpoints" / step_name(step)).rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    said, found = gone_on_with(tmp_path / "run")
    assert found is not None
    assert found.manifest["step"] == min(emptied) - 3
    assert sentence in said[0]


def test_deleted_ones_are_none_and_nothing_begins_anew_by_itself(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    saves = tmp_path / "run" / "checkpoints"
    shutil.rmtree(saves / step_name(12))
    said, found = gone_on_with(tmp_path / "run")
    assert found is not None
    assert (said, found.manifest["step"]) == ([], 9)
    for step in (3, 6, 9):
        (saves / step_name(step) / "manifest.json").unlink()
    with pytest.raises(RecipeError, match=r"holds no whole checkpoint .*step 9 is damaged: it has no manifest"):
        gone_on_with(tmp_path / "run")
    for step in (3, 6, 9):
        shutil.rmtree(saves / step_name(step))
    with pytest.raises(RecipeError, match="step-000012, which was the newest, is gone"):
        gone_on_with(tmp_path / "run")
    (saves / "latest").unlink()
    said, found = gone_on_with(tmp_path / "run")
    assert found is None
    assert said == [f"{saves} holds no checkpoint: the run begins with step 1"]


def gone_on_with(run: Path) -> tuple[list[str], Checkpoint | None]:
    """What a resuming run says, and the checkpoint that it goes on from."""
    said: list[str] = []
    recipe = load_recipe(RECIPE, [f"run={run}", *SETTINGS])
    return said, last_checkpoint(RunPlan.of(recipe), starting_point(recipe.model, recipe.seed).config, said.append)


def test_a_checkpoint_is_read_with_tensorstore_alone(straight: Path) -> None:
    """As docs/checkpoint-format.md says."""
    import tensorstore

    folder = straight / "checkpoints" / "latest"
    entry = json.loads((folder / "manifest.json").read_text())["tensors"]["exp_avg/model.norm.weight"]
    path = str(folder / "arrays" / "exp_avg" / "model.norm.weight")
    array = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result()
    assert list(array.shape) == entry["shape"] == [64]
    assert np.abs(array.read().result()).max() > 0


@pytest.mark.exhaustive
def test_adapters_go_on_and_their_base_stays(tmp_path: Path, train: Train) -> None:
    """As any other run: a declaration is all that differs."""
    constant = ("pretrain.optimizer.schedule=constant", "pretrain.optimizer.learning_rate=0.01")
    adapters = ("trainer.trainable.lora.rank=4", "layout.tensor=2", *constant)
    for run, steps, options in (("whole", 6, ()), ("cut", 3, ()), ("cut", 6, ("--resume",))):
        settings = f"run={tmp_path}/{run}", f"pretrain.steps={steps}", *adapters
        code, output = train(tmp_path / "log", RECIPE, *settings, options=options)
        assert code == 0, output
    first, base = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "whole" / "model")
    for name, entry in first.tensors.items():
        box = whole(tuple(entry["shape"]))
        np.testing.assert_array_equal(first.read(name, box), Checkpoint(tmp_path / "cut").read(name, box), name)
        if "/" not in name:
            assert (first.read(name, box) != base.read(name, box)).any() == is_adapter(name), name
