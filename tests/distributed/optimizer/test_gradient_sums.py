"""Gradients of a bf16 model over many micro-batches: the optimizer is given their sum, in every ZeRO stage."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lockstep.data.batch import Sample, sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, MoEConfig
from lockstep.model.loading import build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import pieces_by_parameter
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from tests.parameters import every

DENSE = ModelConfig(
    layers=2, width=48, heads=6, kv_heads=2, head_dim=8, intermediate=80, vocabulary=61, context=64, tied=True
)
MODELS = {
    "dense": DENSE,
    "experts": DENSE.model_copy(update={"moe": MoEConfig(experts=4, experts_per_token=2, intermediate=40)}),
}
MICRO_BATCHES = 64
BETA = 0.5
Sums = dict[str, tuple[int, np.ndarray[Any, Any]]]


def texts() -> list[Sample]:
    """Each a micro-batch of its own, where rows have one token: no two have the same prompt."""
    tokens = np.random.default_rng(1).integers(0, DENSE.vocabulary, (MICRO_BATCHES, 10))
    return [sample(divmod(i, DENSE.vocabulary), t, weight=1 / (10 * MICRO_BATCHES)) for i, t in enumerate(tokens)]


def trainer_of(groups: Groups, model: ModelConfig, gradient_dtype: Literal["float32", "bfloat16"]) -> Trainer:
    config = OptimizerConfig(beta1=BETA, clip_norm=0.0, gradient_dtype=gradient_dtype)
    return Trainer(build(model, groups, torch.bfloat16, RandomWeights(model, 3, deviation=0.2)), groups, config)


def taken(trainer: Trainer, batch: Sequence[Sample]) -> Sums:
    """What a first step takes for gradients, (1 − β₁)⁻¹ times its first moments: this rank's elements, by parameter."""
    rows = rows_for_ranks(batch, row_rules(trainer.groups.layout, 1))[trainer.groups.data_rank]
    trainer.step(rows, nll, 0.0)
    names = {parameter: pieces[0].name for parameter, pieces in pieces_by_parameter(trainer.transformer).items()}
    found = {}
    for shard in trainer.engine.flat_shards():
        start = shard.cuts[shard.group.rank()] if len(shard.cuts) > 2 else 0
        found[names[shard.parameter]] = start, shard.values["exp_avg"].double().numpy() / (1 - BETA)
    return found


def one_by_one(groups: Groups, model: ModelConfig) -> Sums:
    """The sum in fp64 of the gradients of each micro-batch alone."""
    trainer, total = trainer_of(groups, model, "float32"), {}
    for text in texts():
        for name, (_, gradient) in taken(trainer, [text]).items():
            total[name] = 0, total[name][1] + gradient if name in total else gradient
        trainer.engine.forget()
    return total


def at_once(groups: Groups, model: ModelConfig, gradient_dtype: Literal["float32", "bfloat16"]) -> Sums:
    return taken(trainer_of(groups, model, gradient_dtype), texts())


def error(ranks: Sequence[Sums], expected: Sums) -> float:
    """The largest relative error of a parameter's gradient on a rank that has part of it."""
    errors = []
    for name, (start, part) in (item for sums in ranks for item in sums.items()):
        whole = expected[name][1]
        errors.append(np.linalg.norm(part - whole[start : start + len(part)]) / np.linalg.norm(whole))
    return max(errors)


@pytest.fixture(scope="module")
def expected(worlds: RankPool) -> dict[str, Sums]:
    return {name: worlds.run(Layout(zero=0), one_by_one, model)[0] for name, model in MODELS.items()}


LAYOUTS = [
    Layout(zero=0),
    Layout(),
    *(Layout(data=2, zero=stage) for stage in range(4)),
    *(Layout(data=2, zero=stage, offload=True) for stage in (1, 2)),
]


def is_quick(name: str, layout: Layout) -> bool:
    return layout.data == 2 and not layout.offload and (name == "dense" or layout.zero == 1)


@pytest.mark.parametrize(("name", "layout"), every(MODELS, LAYOUTS, part=is_quick), ids=str)
def test_gradients_add_up_without_loss(name: str, layout: Layout, expected: dict[str, Sums], worlds: RankPool) -> None:
    assert error(worlds.run(layout, at_once, MODELS[name], "float32"), expected[name]) < 2e-6


def test_sums_in_bf16_are_a_choice_and_lose_more(expected: dict[str, Sums], worlds: RankPool) -> None:
    lost = error(worlds.run(Layout(data=2), at_once, DENSE, "bfloat16"), expected["dense"])
    assert 2e-3 < lost < 5e-2
