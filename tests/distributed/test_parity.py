"""Any layout, the same numbers: losses, norms and weights of a few steps against one process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.data.batch import Sample, sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.layers.recompute import Recompute
from lockstep.model.loading import build, transformer_of
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import OptimizerConfig, TrainerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from tests.parameters import every

LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(data=2),
    Layout(pipeline=4),
    Layout(tensor=2, data=2),
    Layout(tensor=2, pipeline=2),
    Layout(pipeline=2, data=2),
    Layout(data=2, zero=0),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2, virtual=2),
    Layout(pipeline=2, data=2, zero=2),
    Layout(pipeline=2, stages=(1, 3)),
    Layout(context=2),
    Layout(context=4),
    Layout(context=2, context_by="ring"),
    Layout(tensor=2, sequence=True, context=2),
    Layout(pipeline=2, context=2, zero=2),
]

ADAMW = OptimizerConfig(learning_rate=1e-3)


def global_batch(vocabulary: int, seed: int) -> list[Sample]:
    """Groups of samples that share prompts, of mixed lengths, weighted to a mean over tokens."""
    draw = np.random.default_rng(seed)
    samples = []
    for _ in range(5):
        prompt = draw.integers(0, vocabulary, draw.integers(1, 20))
        for _ in range(draw.integers(1, 4)):
            samples.append(sample(prompt, draw.integers(0, vocabulary, draw.integers(1, 15)), weight=1 / 100))
    return samples


def train(
    groups: Groups,
    folder: Path,
    steps: int,
    row_tokens: int,
    recompute: Recompute = "none",
    optimizer: OptimizerConfig = ADAMW,
    traced: bool = False,
) -> tuple[list[tuple[float, float]], Any]:
    """Losses, norms and the owned pieces of the weights after some steps."""
    source = HuggingFaceFolder(folder)
    stage = build(source.config, groups, torch.float32, source)
    trainer = Trainer(stage, groups, optimizer, config=TrainerConfig(recompute=recompute))
    if traced:
        trainer.transformer.compile_blocks("eager")
    history = []
    for step in range(steps):
        batch = global_batch(source.config.vocabulary, step % 2)
        rows = rows_for_ranks(batch, row_rules(groups.layout, row_tokens))
        result = trainer.step(rows[groups.data_rank], nll, optimizer.learning_rate)
        history.append((result.values["loss"], result.grad_norm))
    with trainer.engine.whole_weights():
        held = pieces(transformer_of(stage))
        return history, [(p.name, p.box, p.view(t).clone().numpy()) for t, p in held if p.owned]


@pytest.fixture(scope="module")
def alone(worlds: RankPool, tiny_folder: Path) -> Any:
    return worlds.run(Layout(), train, tiny_folder, 4, 64)[0]


def assembled(parts: list[Any], shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    whole = {name: np.full(array.shape, np.nan, np.float32) for name, array in shapes.items()}
    for name, box, array in (piece for part in parts for piece in part):
        target = whole[name][tuple(slice(a, b) for a, b in box)]
        assert np.isnan(target).all(), f"{name} {box} was written twice"
        target[:] = array
    return whole


@pytest.mark.parametrize(
    "layout",
    every(LAYOUTS, part=lambda layout: layout.processes < 4 or (layout.data == 1 and layout.pipeline < 4)),
    ids=str,
)
def test_a_layout_trains_to_the_same_numbers(layout: Layout, alone: Any, worlds: RankPool, tiny_folder: Path) -> None:
    results = worlds.run(layout, train, tiny_folder, 4, 64)
    history, held = alone
    for rank, (other, _) in enumerate(results):
        np.testing.assert_allclose(other, history, rtol=2e-5, err_msg=f"rank {rank}")
    expected = {name: array for name, _, array in held}
    for name, array in assembled([part for _, part in results], expected).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def scored(groups: Groups, folder: Path) -> list[Any]:
    """log p of the whole batch, by row of this rank."""
    source = HuggingFaceFolder(folder)
    trainer = Trainer(build(source.config, groups, torch.float32, source), groups, OptimizerConfig())
    rows = rows_for_ranks(global_batch(source.config.vocabulary, 0), row_rules(groups.layout, 64))
    return [logp.numpy() for logp in trainer.score(rows[groups.data_rank])]


@pytest.mark.parametrize("layout", [Layout(context=2), Layout(tensor=2, sequence=True), Layout(pipeline=2)], ids=str)
def test_a_row_has_the_same_scores_in_any_layout(layout: Layout, worlds: RankPool, tiny_folder: Path) -> None:
    alone = worlds.run(Layout(), scored, tiny_folder)[0]
    for rank, found in enumerate(worlds.run(layout, scored, tiny_folder)):
        if found or rank >= layout.processes // layout.pipeline:  # the last stage has the scores
            for a, b in zip(found, alone, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row_tokens", [1, 40, 1000])
def test_the_size_of_a_micro_batch_changes_no_number(
    row_tokens: int, alone: Any, worlds: RankPool, tiny_folder: Path
) -> None:
    history, _ = worlds.run(Layout(), train, tiny_folder, 4, row_tokens)[0]
    np.testing.assert_allclose(history, alone[0], rtol=2e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, sequence=True), Layout(data=2, zero=3)], ids=str)
def test_computing_activations_again_changes_no_number(
    recompute: str, layout: Layout, alone: Any, worlds: RankPool, tiny_folder: Path
) -> None:
    history, _ = worlds.run(layout, train, tiny_folder, 4, 64, recompute)[0]
    np.testing.assert_allclose(history, alone[0], rtol=0 if layout == Layout() else 2e-5)


def test_blocks_that_torch_compile_traces_compute_the_same(alone: Any, worlds: RankPool, tiny_folder: Path) -> None:
    """Its kernels need an accelerator; what it makes of our code does not."""
    history, _ = worlds.run(Layout(), train, tiny_folder, 4, 64, "none", ADAMW, True)[0]
    np.testing.assert_allclose(history, alone[0], rtol=2e-5)


def test_training_learned_something(alone: Any) -> None:
    losses = [loss for loss, _ in alone[0]]
    assert losses[2] < losses[0]
    assert losses[3] < losses[1]
