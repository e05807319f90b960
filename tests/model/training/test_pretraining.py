"""After a rewind a run is, to the bit, one that never took the steps that were taken back, in every layout."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.data.corpus.loader import PretrainingConfig, PretrainingData
from lockstep.data.corpus.sample_schedule import Rewind
from lockstep.data.corpus.synthetic import write_random_store
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, MoEConfig
from lockstep.model.loading import DTYPES, build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import OptimizerConfig, PretrainConfig, row_rules
from lockstep.model.training.pretraining import Pretraining
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from tests.parameters import every

LAYOUTS = [
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual=2, zero=2),
    Layout(expert=2, zero=2),
    Layout(data=2, zero=0),
    Layout(data=2, zero=1),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(data=2, zero=2, offload=True),
    Layout(data=2, zero=3, offload=True),
]
CONFIG = PretrainConfig(
    steps=8,
    samples_per_step=4,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1, schedule="cosine", weight_decay=0.1),
)
MUON = CONFIG.optimizer.model_copy(update={"kind": "muon"})
History = list[tuple[float, float]]


def model(layout: Layout) -> ModelConfig:
    """A tiny transformer whose embedding two stages share, with experts where the layout splits them."""
    return ModelConfig(
        layers=4,
        width=32,
        heads=4,
        kv_heads=2,
        head_dim=8,
        intermediate=48,
        vocabulary=61,
        context=32,
        tied=layout.expert == 1,
        moe=MoEConfig(experts=4, experts_per_token=2, intermediate=24) if layout.expert > 1 else None,
    )


def parts(groups: Groups, store: Path, dtype: str, optimizer: OptimizerConfig) -> tuple[Trainer, PretrainingData]:
    config = model(groups.layout)
    data = PretrainingConfig.model_validate({"blend": [{"path": str(store)}], "length": 16})
    stage = build(config, groups, DTYPES[dtype], RandomWeights(config, 0))
    return Trainer(stage, groups, optimizer), PretrainingData(data, seed=0, vocabulary=61)


def weights(trainer: Trainer) -> list[np.ndarray]:
    with trainer.engine.whole_weights():
        return [t.detach().float().numpy().copy() for t, _ in pieces(trainer.transformer)]


def with_rewinds(groups: Groups, *args: Any) -> tuple[History, Any, list[float]]:
    """Losses and norms of the steps that stand, the weights, and the losses of steps that spoil weights and moments."""
    trainer, data = parts(groups, *args)
    rules = row_rules(groups.layout, 32)
    pretraining = Pretraining(trainer, CONFIG, data, rules)
    schedule = CONFIG.schedule
    standing: dict[int, tuple[float, float]] = {}
    wild: list[float] = []

    def steps(first: int, last: int) -> None:
        for step in range(first, last + 1):
            result = pretraining.step(step)
            standing[step] = result.values["loss"], result.grad_norm

    def spoil_and_go_back(rewind: Rewind) -> None:
        nonlocal schedule
        rows = data.rows(schedule.samples(rewind.spike), rules, groups.data_rank)
        wild.extend(trainer.step(rows, nll, math.nan).values["loss"] for _ in range(3))
        schedule = schedule.after(rewind)
        pretraining.rewind(rewind.snapshot, schedule)

    pretraining.keep_snapshot()
    steps(1, 1)
    spoil_and_go_back(Rewind(0, 2))
    steps(1, 2)
    pretraining.keep_snapshot()
    steps(3, 4)
    spoil_and_go_back(Rewind(2, 5))
    spoil_and_go_back(Rewind(2, 3))
    steps(3, 8)
    pretraining.close()
    return list(standing.values()), weights(trainer), wild


def without_those_steps(groups: Groups, *args: Any) -> tuple[History, Any]:
    """The same steps and no others, with their samples written out."""
    trainer, data = parts(groups, *args)
    history = []
    for step, first in enumerate((8, 12, 32, 36, 40, 44, 48, 52), start=1):
        rows = data.rows(range(first, first + 4), row_rules(groups.layout, 32), groups.data_rank)
        result = trainer.step(rows, nll, CONFIG.optimizer.rate(step, CONFIG.steps))
        history.append((result.values["loss"], result.grad_norm))
    return history, weights(trainer)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_store(tmp_path_factory.mktemp("store") / "store", vocabulary=61, tokens=4000, seed=1)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    every(
        LAYOUTS,
        ["float32", "bfloat16"],
        part=lambda layout, dtype: layout.zero in (2, 3) and (dtype == "float32") != (layout.expert == 2),
    ),
    ids=str,
)
def test_after_a_rewind_no_bit_remembers_the_steps_that_were_taken_back(
    layout: Layout, dtype: str, worlds: RankPool, store: Path
) -> None:
    check(worlds, layout, store, dtype, CONFIG.optimizer)


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(data=2, zero=0), Layout(data=2, zero=2)], ids=str)
def test_muon_goes_back_as_well(layout: Layout, worlds: RankPool, store: Path) -> None:
    check(worlds, layout, store, "float32", MUON)


def with_and_without_a_spoilt_step(groups: Groups, *args: Any) -> tuple[list[Any], list[float]]:
    """Weights and norm of a step, after one whose gradient is no number on one rank and after none."""
    found, spoilt_norms = [], []
    for spoil in (True, False):
        trainer, data = parts(groups, *args)
        rows = data.rows(range(4), row_rules(groups.layout, 32), groups.data_rank)
        if spoil:
            first, *rest = rows
            if groups.rank == 0:
                first = replace(first, weight=first.weight * np.float32(math.nan))
            before = weights(trainer)
            spoilt_norms.append(trainer.step([first, *rest], nll, 1e-3).grad_norm)
            for ours, theirs in zip(weights(trainer), before, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        result = trainer.step(rows, nll, 1e-3)
        found.append([np.float64(result.grad_norm), *weights(trainer)])
    return found, spoilt_norms


@pytest.mark.parametrize(
    ("layout", "dtype"),
    every(
        [
            Layout(tensor=2),
            Layout(data=2, zero=0),
            Layout(data=2, zero=1),
            Layout(data=2, zero=2),
            Layout(data=2, zero=3),
            Layout(data=2, zero=2, offload=True),
        ],
        ["float32", "bfloat16"],
        part=lambda layout, dtype: dtype == "float32" or layout.offload or layout.zero in (1, 3),
    ),
    ids=str,
)
def test_a_gradient_that_is_no_number_leaves_weights_and_moments_alone(
    layout: Layout, dtype: str, worlds: RankPool, store: Path
) -> None:
    check_spoilt(worlds, layout, store, dtype, CONFIG.optimizer)


@pytest.mark.parametrize("layout", [Layout(tensor=2, zero=0), Layout(data=2, zero=1)], ids=str)
def test_so_does_muon(layout: Layout, worlds: RankPool, store: Path) -> None:
    check_spoilt(worlds, layout, store, "float32", MUON)


def check_spoilt(worlds: RankPool, layout: Layout, *args: Any) -> None:
    results = worlds.run(layout, with_and_without_a_spoilt_step, *args)
    for (after, without), norms in results:
        assert not np.isfinite(norms).any()
        for ours, theirs in zip(after, without, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def check(worlds: RankPool, layout: Layout, *args: Any) -> None:
    expected = worlds.run(layout, without_those_steps, *args)
    for (history, held, wild), (losses, unspoilt) in zip(
        worlds.run(layout, with_rewinds, *args), expected, strict=True
    ):
        assert not np.isfinite(wild).all(), "nothing was spoilt"
        assert history == losses
        for ours, theirs in zip(held, unspoilt, strict=True):
            np.testing.assert_array_equal(ours, theirs)
