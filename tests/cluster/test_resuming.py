"""A run that was killed and goes on ends with the weights, and the optimizer, of one that was not, to the bit."""

import json
from pathlib import Path

import numpy as np
import pytest

from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.spec import whole
from tests.cluster.commands import Command, metrics, overrides, summary, until

RECIPE = str(Path(__file__).parents[2] / "recipes" / "parity-tiny.toml")
STEPS = 30
SETTINGS = (
    f"pretrain.steps={STEPS}",
    "layout.data=2",
    "layout.zero=2",
    "checkpoints.every=3",
    "pretrain.evaluate_every=3",
)


def train(folder: Path, *words: str, settings: tuple[str, ...] = SETTINGS) -> tuple[int, str]:
    command = Command(folder / "log", "train", RECIPE, *overrides(f"run={folder}/run", *settings), *words)
    try:
        return command.wait(), command.output
    finally:
        command.kill()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    code, output = train(folder)
    assert code == 0, output
    return folder / "run"


def killed_after_a_checkpoint(folder: Path) -> Path:
    """A run that was killed outright when its first checkpoint was there."""
    command = Command(folder / "log", "train", RECIPE, *overrides(f"run={folder}/run", *SETTINGS))
    try:
        until(lambda: (folder / "run" / "checkpoints" / "step-000003").exists(), 120)
    finally:
        command.kill()
    assert Checkpoint(folder / "run").manifest["step"] < STEPS
    return folder / "run"


def check_equal(a: Path, b: Path) -> None:
    first, second = Checkpoint(a), Checkpoint(b)
    assert first.manifest["step"] == second.manifest["step"] == STEPS
    assert first.tensors.keys() == second.tensors.keys()
    assert len(first.states) == 2 * (len(first.tensors) - len(first.states))
    for name, entry in first.tensors.items():
        box = whole(tuple(entry["shape"]))
        np.testing.assert_array_equal(first.read(name, box), second.read(name, box), name)


def test_a_killed_run_goes_on_to_the_same_bits(straight: Path, tmp_path: Path) -> None:
    run = killed_after_a_checkpoint(tmp_path)
    code, output = train(tmp_path, "--resume")
    assert code == 0, output
    assert "going on after step" in output
    check_equal(straight, run)
    # Steps after the checkpoint stand twice in the metrics: the later one counts.
    one, other = ({m["step"]: (m["loss"], m["grad_norm"]) for m in metrics(r, "pretrain")} for r in (straight, run))
    assert one == other
    assert summary(run)["status"] == "finished"
    assert (run / "checkpoints" / "best").resolve().name == (straight / "checkpoints" / "best").resolve().name


def test_a_finished_run_goes_on_in_another_layout(straight: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(straight)
    settings = (SETTINGS[0], "layout.tensor=2", "layout.sequence=true")
    code, output = train(tmp_path, "--resume", settings=settings)
    assert code == 0, output
    assert f"going on after step {STEPS}" in output


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("pretrain.optimizer.kind=muon", "was saved with pretrain.optimizer.kind=adamw, and the recipe says muon"),
        ("seed=3", "was saved with seed=0, and the recipe says 3"),
        ("model.config.layers=2", "was saved with model="),
    ],
)
def test_another_run_is_not_gone_on_with(setting: str, sentence: str, straight: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in straight.iterdir())
    (tmp_path / "run").symlink_to(straight)
    code, output = train(tmp_path, "--resume", settings=(*SETTINGS, setting))
    assert code == 2, output
    assert sentence in " ".join(output.split())
    assert sorted(p.name for p in straight.iterdir()) == before


def test_a_checkpoint_is_read_with_tensorstore_alone(straight: Path) -> None:
    """As docs/checkpoint-format.md says."""
    import tensorstore

    folder = straight / "checkpoints" / "latest"
    entry = json.loads((folder / "manifest.json").read_text())["tensors"]["exp_avg/model.norm.weight"]
    path = str(folder / "arrays" / "exp_avg" / "model.norm.weight")
    array = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}).result()
    assert list(array.shape) == entry["shape"] == [64]
    assert np.abs(array.read().result()).max() > 0
