"""A run that meets a document unlike all others goes back and leaves it out; one that meets nothing else ends."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.cluster.recipe.load import load_recipe
from lockstep.data.corpus.indexed_dataset import Note
from lockstep.data.corpus.indexed_dataset_writer import IndexedDatasetWriter
from lockstep.data.corpus.loader import PretrainingData
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.storage import storage_of
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig
from lockstep.model.loading import build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import row_rules
from lockstep.model.training.trainer import Trainer
from tests.cluster.cli_process import Train, metrics, summary

RECIPE = Path(__file__).parents[3] / "recipes" / "parity-tiny.toml"
STEPS, STRANGE = 32, 1300
PER_STEP = 16


def write_store(path: Path) -> Path:
    """Documents of few different tokens, and among them a long one of tokens that no other has."""
    draw = np.random.default_rng(0)
    documents = [draw.choice(8, size=64) for _ in range(300)]
    documents[100] = 50 + draw.choice(200, size=STRANGE)
    writer = IndexedDatasetWriter(path, vocabulary=251)
    writer.add(np.concatenate(documents), np.array([len(d) for d in documents]))
    writer.finish(Note("d", 251, 0, "m", writer.documents, writer.tokens))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "store")


def settings(folder: Path, store: Path) -> tuple[str, ...]:
    """With this seed the strange document makes up most of steps 20 to 22."""
    data = ("seed=3", "pretrain.data.length=32", f'pretrain.data.blend=[{{path="{store}"}}]', f"run={folder}/run")
    spikes = ("pretrain.spikes.window=6", "pretrain.spikes.snapshot_every=5")
    return *data, *spikes, f"pretrain.steps={STEPS}", "pretrain.optimizer.learning_rate=1e-2", "layout.data=2"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store: Path, train: Train) -> Path:
    folder = tmp_path_factory.mktemp("rewinds")
    code, output = train(
        folder / "log", RECIPE, *settings(folder, store), "checkpoints.every=6", "pretrain.spikes.rewinds=3"
    )
    assert code == 0, output
    (folder / "run" / "log").write_text(output)
    return folder / "run"


def test_the_strange_samples_are_left_out_and_the_run_ends_as_if_they_did_not_exist(run: Path) -> None:
    steps = {int(m["step"]): m for m in metrics(run, "pretrain")}  # the last line of each
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert steps[STEPS]["loss"] < steps[15]["loss"] < 2.5
    assert steps[STEPS]["rewinds"] == 3
    assert steps[STEPS]["samples_left_out"] == 7 * PER_STEP
    assert Checkpoint(run).manifest["left_out"] == [[240, 320], [320, 336], [336, 352]]
    assert summary(run)["status"] == "finished"


def test_checkpoints_that_were_taken_back_are_saved_again(run: Path) -> None:
    assert sorted(manager.saved(storage_of(run / "checkpoints"))) == [*range(6, STEPS, 6), STEPS]


def test_every_rewind_is_on_the_screen_and_in_the_metrics(run: Path) -> None:
    rewinds = metrics(run, "rewind")
    assert [(r["step"], r["back_to"], r["samples_left_out"]) for r in rewinds] == [
        (20, 15, 80),
        (16, 15, 96),
        (16, 15, 112),
    ]
    assert [r["rewinds"] for r in rewinds] == [1, 2, 3]
    assert all(r["loss"] > 3 for r in rewinds)
    output = (run / "log").read_text()
    assert "is a spike: back to step 15, without samples 240 to 319; 2 more such rewinds may follow" in output


def without_the_strange_samples(groups: Groups, run: Path, store: Path) -> tuple[list[float], bool]:
    """Losses of a run that reads what is left, and whether its weights are those that the command saved."""
    recipe = load_recipe(RECIPE, settings(run.parent, store))
    assert recipe.pretrain is not None
    assert recipe.pretrain.data is not None
    start = Checkpoint(run / "model")
    stage = build(ModelConfig(**start.manifest["model"]), groups, torch.float32, start)
    trainer = Trainer(stage, groups, recipe.pretrain.optimizer)
    data = PretrainingData(recipe.pretrain.data, seed=3, vocabulary=251)
    losses = []
    for step in range(1, STEPS + 1):
        first = PER_STEP * (step - 1 if step <= 15 else step + 6)
        rows = data.rows(range(first, first + PER_STEP), row_rules(groups.layout, 64), groups.data_rank)
        losses.append(trainer.step(rows, nll, recipe.pretrain.optimizer.rate(step, STEPS)).values["loss"])
    saved = Checkpoint(run)
    held = ((p.view(t).numpy(), saved.read(p.name, p.box)) for t, p in pieces(trainer.transformer))
    return losses, all(np.array_equal(ours, theirs) for ours, theirs in held)


def test_losses_and_weights_are_those_of_a_run_that_never_saw_them(run: Path, worlds: RankPool, store: Path) -> None:
    standing = {int(m["step"]): m["loss"] for m in metrics(run, "pretrain")}
    for losses, same_weights in worlds.run(Layout(data=2), without_the_strange_samples, run, store):
        assert losses == [standing[step] for step in range(1, STEPS + 1)]
        assert same_weights


@pytest.mark.exhaustive
def test_a_spike_too_many_ends_the_run_with_good_weights_and_the_batch(
    tmp_path: Path, store: Path, train: Train
) -> None:
    code, output = train(tmp_path / "log", RECIPE, *settings(tmp_path, store), "pretrain.spikes.rewinds=1")
    file = tmp_path / "run" / "batches" / "step-000016.npz"
    assert code == 1
    assert "the run went back as often as pretrain.spikes.rewinds allows: the weights of step 15 are saved" in output
    assert f"what step 16 read is in {file}" in output
    assert "Traceback" not in output
    assert Checkpoint(tmp_path / "run").manifest["step"] == 15
    assert np.isfinite(Checkpoint(tmp_path / "run").read("model.norm.weight", ((0, 64),)).astype(np.float32)).all()
    with np.load(file) as batch:
        assert batch["samples"].tolist() == list(range(320, 336))
        assert (batch["tokens"] >= 50).all()
        assert (batch["documents"] == 100).all()
        assert set(batch["stores"].tolist()) == {str(store)}
