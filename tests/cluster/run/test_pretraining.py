"""A recipe that trains on text: from random weights to a checkpoint and a report, or a sentence and nothing written."""

import json
import math
import tomllib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lockstep.cluster.launch.preflight import check
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import load_recipe, parse, to_toml
from lockstep.cluster.records.charts import MEMORY_UNIT
from lockstep.data.corpus.indexed_dataset import IndexedDataset
from lockstep.data.corpus.synthetic import write_random_store
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.tensors import whole
from lockstep.model.training.trainable import NothingLearns
from lockstep.model.weights.names import logical_tensors
from tests.cluster.cli_process import Command, Train, metrics, summary
from tests.distributed.traces import steps_and_kinds
from tests.documented import check_run

RECIPE = Path(__file__).parents[3] / "recipes" / "parity-tiny.toml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    every = ("pretrain.evaluate_every=6", "pretrain.statistics_every=5")
    settings = ("layout.data=2", "layout.zero=2", "pretrain.steps=12", "pretrain.optimizer.kind=muon", *every)
    code, output = train(folder / "log", RECIPE, f"run={folder}/run", *settings, options=("--profile",))
    assert code == 0, output
    check_run(folder / "run")
    return folder / "run"


def test_the_loss_falls_and_the_held_out_loss_with_it(run: Path) -> None:
    steps = metrics(run, "pretrain")
    assert [m["step"] for m in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    held_out = metrics(run, "held_out")
    assert [m["step"] for m in held_out] == [0, 6, 12]
    assert held_out[0]["loss"] == pytest.approx(math.log(251), abs=0.1)
    assert held_out[2]["loss"] < held_out[1]["loss"] < held_out[0]["loss"]


def test_layers_are_told_apart_where_it_was_asked_for(run: Path) -> None:
    parts = ["embedding", *(f"layers.{layer}" for layer in range(4)), "norm"]
    for step in metrics(run, "pretrain"):
        norms = {name: value for name, value in step.items() if name.startswith("grad_norm/")}
        assert list(norms) == ([f"grad_norm/{part}" for part in parts] if step["step"] in (5, 10) else [])
        if norms:
            assert math.hypot(*norms.values()) == pytest.approx(step["grad_norm"])
            assert step["weight_rms/norm"] == pytest.approx(1, abs=0.02)
            drawn, scales = 64 * (64 + 2 * 32 + 64 + 3 * 96), 2 * 64  # normal of 0.02, and 1
            expected = math.sqrt((0.02**2 * drawn + scales) / (drawn + scales))
            assert step["weight_rms/layers.2"] == pytest.approx(expected, rel=0.02)


def test_speed_is_given_in_tokens_and_in_a_share_of_a_peak_that_was_measured(run: Path) -> None:
    speed = summary(run)["speed"]
    for step in metrics(run, "pretrain"):
        share = step["train_tokens_per_second"] * speed["flops_per_token"] / speed["peak_flops"]
        assert step["mfu"] == pytest.approx(share)
        assert 0 < share < 1


def test_each_step_says_how_much_memory_the_fullest_rank_has_needed(run: Path) -> None:
    peaks = [m["memory_gb"] for m in metrics(run, "pretrain")]
    assert all(later > 0.999 * before for before, later in pairwise(peaks))
    assert 0.1 < peaks[0] < 8
    assert MEMORY_UNIT in (run / "report.html").read_text()


def test_a_trace_of_each_rank_shows_forward_backward_and_collectives(run: Path) -> None:
    traces = run / "traces"
    assert sorted(p.name for p in traces.iterdir()) == ["rank-0.json", "rank-1.json"]
    for path in traces.iterdir():
        assert steps_and_kinds(path) == (3, dict.fromkeys(("forward", "backward", "collective"), True))
    output = (run.parent / "log").read_text()
    assert f"traces of steps 3 to 5: {traces}/rank-*.json" in output
    assert "profiler_start" not in output


def test_the_trained_weights_are_a_checkpoint_and_the_run_has_a_report(run: Path) -> None:
    checkpoint = Checkpoint(run)
    assert checkpoint.manifest["step"] == 12
    name = "model.layers.3.mlp.down_proj.weight"
    before, after = (c.read(name, ((0, 64), (0, 96))) for c in (Checkpoint(run / "model"), checkpoint))
    assert np.abs(after - before).max() > 1e-4
    page = (run / "report.html").read_text()
    assert "Held-out loss" in page
    assert "There is no RL step" not in page


@pytest.mark.exhaustive
def test_a_run_whose_gradients_are_no_numbers_ends_and_keeps_the_weights_before(tmp_path: Path, train: Train) -> None:
    settings = ("pretrain.steps=8", "pretrain.optimizer.learning_rate=1e30", "pretrain.give_up_after=2")
    code, output = train(tmp_path / "log", RECIPE, f"run={tmp_path}/run", *settings)
    assert code == 1
    assert "2 steps in a row" in output
    assert "Traceback" not in output
    steps = metrics(tmp_path / "run", "pretrain")
    assert steps[-1]["skipped"] == 2
    last = int(steps[-1]["step"])
    assert Checkpoint(tmp_path / "run").manifest["step"] == last < 8
    file = tmp_path / "run" / "batches" / f"step-{last:06d}.npz"
    assert str(file) in output
    with np.load(file) as batch:
        assert batch["samples"].tolist() == list(range(16 * (last - 2), 16 * last))
        assert batch["tokens"].shape == batch["documents"].shape == (32, 33)


def test_text_becomes_a_tokenizer_a_store_and_a_model_in_three_commands(tmp_path: Path, train: Train) -> None:
    draw = np.random.default_rng(0)
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    lines = [" ".join(draw.choice(words, size=30)) for _ in range(600)]
    text, tokenizer, store = str(tmp_path / "text.jsonl"), str(tmp_path / "tokenizer"), str(tmp_path / "corpus")
    Path(text).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    recipe = RECIPE.with_name("pretrain-10m.toml")
    small = ("model.config.layers=2", "model.config.width=64", "model.config.heads=1", "model.config.kv_heads=1")
    steps = ("pretrain.steps=4", "pretrain.samples_per_step=4", "pretrain.data.length=64", f"run={tmp_path}/run")
    places = (f"model.tokenizer={tokenizer}", f'pretrain.data.blend=[{{path="{store}"}}]')
    for arguments in (
        ("data", "tokenizer", text, tokenizer, "--vocabulary", "300"),
        ("data", "tokenize", text, store, "--tokenizer", tokenizer),
    ):
        command = Command(tmp_path / "log", *arguments)
        try:
            assert command.wait() == 0, command.output
        finally:
            command.kill()
    code, output = train(tmp_path / "log", recipe, *small, *steps, *places)
    assert code == 0, output
    losses = [m["loss"] for m in metrics(tmp_path / "run", "pretrain")]
    assert losses[0] == pytest.approx(math.log(4096), abs=0.3)
    assert losses[-1] < losses[0]
    assert "tokenizer.json" in Checkpoint(tmp_path / "run").files


def test_text_that_cannot_be_read_is_one_sentence_and_nothing_is_written(tmp_path: Path) -> None:
    store = write_random_store(tmp_path / "store", vocabulary=251, tokens=5000, seed=0)
    Path(f"{store}.bin").write_bytes(b"")
    recipe = tmp_path / "recipe.toml"
    data = f'\n[pretrain.data]\nlength = 32\nblend = [{{ path = "{store}" }}]\n'
    recipe.write_text(RECIPE.read_text().replace('name = "parity-tiny"', f'name = "x"\nrun = "{tmp_path}/run"') + data)
    command = Command(tmp_path / "log", "train", str(recipe))
    assert command.wait() == 2
    assert "store.bin" in command.output
    assert "Traceback" not in command.output
    assert not (tmp_path / "run").exists()


def test_samples_longer_than_the_models_context_are_refused() -> None:
    recipe = load_recipe(RECIPE, ['pretrain.data.blend=[{path="nowhere"}]', "pretrain.data.length=65"])
    with pytest.raises(RecipeError, match="length=65 is longer than the model's context of 64 tokens"):
        check(recipe)


def test_a_recipe_trains_on_text_or_on_problems() -> None:
    with pytest.raises(RecipeError, match=r"with \[pretrain\], or on problems"):
        load_recipe(RECIPE, ["rl.steps=1"])


def test_learned_positions_survive_a_recipe_and_its_resolved_form() -> None:
    recipe = load_recipe(RECIPE, ["model.config.rope=learned", "model.config.kv_heads=8"])
    assert recipe.model.config is not None
    assert recipe.model.config.rope is None
    assert parse(tomllib.loads(to_toml(recipe))) == recipe


def test_random_documents_end_in_token_0_and_mostly_follow_a_rule(tmp_path: Path) -> None:
    store = IndexedDataset(write_random_store(tmp_path / "store", vocabulary=64, tokens=20_000, seed=3))
    assert store.tokens >= 20_000
    following: dict[int, list[int]] = {}
    for index in range(store.documents):
        document = store.document(index)
        assert document[-1] == 0
        assert (document[:-1] > 0).all()
        for last, token in zip(document[:-2].tolist(), document[1:-1].tolist(), strict=True):
            following.setdefault(last, []).append(token)
    commonest = [max(map(seen.count, set(seen))) / len(seen) for seen in following.values() if len(seen) > 100]
    assert np.median(commonest) > 0.7
    assert json.loads(Path(f"{store.path}.json").read_text())["documents"] == store.documents


def test_one_declaration_says_what_learns(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, [f"run={tmp_path}/run", "trainer.trainable.lora.rank=4"])
    start = check(recipe).start
    source, model = start.source, start.config
    assert model.adapted == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    name, shape = "model.layers.2.self_attn.v_proj.lora_A.weight", (4, model.width)
    assert logical_tensors(model)[name] == shape
    drawn = source.read(name, whole(shape))
    assert 0.5 < np.abs(drawn).max() * math.sqrt(model.width) <= 1
    assert parse(tomllib.loads(to_toml(recipe))) == recipe
    given = load_recipe(RECIPE, [f"run={tmp_path}/run", "trainer.trainable.tensors=biases"])
    with pytest.raises(NothingLearns, match="it has no biases"):
        check(given)
