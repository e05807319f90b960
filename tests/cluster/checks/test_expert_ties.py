"""Ties of routers: choices are counted alike in every layout, and only a close call excuses that they differ."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.cluster.checks.expert_ties import TIE, Choices, Routing, RoutingWatch, tie
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, MoEConfig
from lockstep.model.layers.recompute import Recompute
from lockstep.model.loading import build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.training.config import TrainerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from tests.distributed.test_parity import ADAMW, global_batch

MODEL = ModelConfig(
    layers=2,
    width=16,
    heads=4,
    kv_heads=2,
    head_dim=4,
    intermediate=24,
    vocabulary=61,
    context=64,
    moe=MoEConfig(experts=4, experts_per_token=2, intermediate=12),
)


def choices(*tokens: int, margin: float = 0.1) -> Choices:
    return Choices(np.array(tokens), margin)


def watched(groups: Groups, recompute: Recompute) -> Routing:
    trainer = Trainer(
        build(MODEL, groups, torch.float32, RandomWeights(MODEL, seed=1)),
        groups,
        ADAMW,
        config=TrainerConfig(recompute=recompute),
    )
    watch = RoutingWatch(trainer.transformer)
    rows = rows_for_ranks(global_batch(MODEL.vocabulary, 0), row_rules(groups.layout, 40))
    trainer.step(rows[groups.data_rank], nll, 1e-3)
    seen = watch.taken()
    assert not watch.taken()
    return seen


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, sequence=True),
        Layout(pipeline=2),
        Layout(expert=2),
        Layout(context=2),
        Layout(data=2, zero=3),
    ],
    ids=str,
)
def test_every_layout_sees_the_same_choices(layout: Layout, recompute: Recompute, worlds: RankPool) -> None:
    (one,) = worlds.run(Layout(), watched, "none")
    found = worlds.run(layout, watched, recompute)
    assert {layer for rank in found for layer in rank} == one.keys() == {0, 1}
    assert tie(one, found) is None
    for layer, expected in one.items():
        ranks = [rank[layer] for rank in found if layer in rank]
        shares = np.sum([c.tokens_E for c in ranks], axis=0) / np.sum([c.tokens_E.sum() for c in ranks])
        np.testing.assert_allclose(shares, expected.tokens_E / expected.tokens_E.sum(), rtol=1e-12)
        assert min(c.margin for c in ranks) == pytest.approx(expected.margin, rel=1e-2, abs=1e-7)


def test_only_a_tie_explains_another_choice() -> None:
    expected = {0: choices(3, 5), 1: choices(4, 4, margin=TIE / 2)}
    halves = [{0: choices(1, 3)}, {0: choices(2, 2)}, {1: choices(8, 8)}]
    assert tie(expected, halves) is None
    assert tie(expected, [{0: choices(3, 5), 1: choices(5, 3)}]) == 1
    assert tie(expected, [{0: choices(2, 6), 1: choices(5, 3)}]) is None, "layer 0 was no close call"
    assert tie({}, [{}]) is None


@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(1, 4))
def test_tokens_that_each_rank_repeats_are_no_other_choice(ranks: list[list[int]], times: int) -> None:
    whole = choices(*np.sum(ranks, axis=0), margin=0.0)
    assert tie({0: whole}, [{0: choices(*rank)} for rank in ranks for _ in range(times)]) is None


def test_a_router_that_chooses_all_experts_has_no_close_call(worlds: RankPool) -> None:
    assert worlds.run(Layout(), all_chosen, 4) == [(4, float("inf"))]


def all_chosen(groups: Groups, experts: int) -> tuple[int, float]:
    assert MODEL.moe
    model = MODEL.model_copy(update={"moe": MODEL.moe.model_copy(update={"experts_per_token": experts})})
    trainer = Trainer(build(model, groups, torch.float32, RandomWeights(model, seed=1)), groups, ADAMW)
    chosen, margin = trainer.transformer.blocks["0"].mlp.choices(torch.randn(7, 1, model.width))
    return chosen.shape[1], margin.min().item()


def test_choices_of_probabilities_that_are_given(worlds: RankPool) -> None:
    assert worlds.run(Layout(), choices_of_unit_vectors) == [[[0, 1], [3, 2]]]


def choices_of_unit_vectors(groups: Groups) -> list[list[int]]:
    trainer = Trainer(build(MODEL, groups, torch.float32, RandomWeights(MODEL, seed=1)), groups, ADAMW)
    moe = trainer.transformer.blocks["0"].mlp
    with torch.no_grad():
        moe.router.zero_()
        moe.router[:, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    x = torch.zeros(2, 1, MODEL.width)
    x[:, 0, 0] = torch.tensor([1.0, -1.0])
    chosen, margin = moe.choices(x)
    best = torch.tensor([3.0, 2.0, 1.0, 0.0]).softmax(-1)
    torch.testing.assert_close(margin, (best[1] - best[2]).expand(2))
    return chosen.tolist()
