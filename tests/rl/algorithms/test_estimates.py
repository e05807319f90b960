"""Scores come back to the tokens that they are of, whatever the layout, and equal plain forward passes."""

from array import array

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.data.batch import Floats, Ints
from lockstep.data.packing import RowRules, rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.config import ModelConfig
from lockstep.model.layers.value_head import ValueHead
from lockstep.model.loading import build, transformer_of
from lockstep.model.training.config import row_rules
from lockstep.model.training.forward import score
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.algorithms.estimates import columns, of_answers, of_completions, of_tokens, scores_of
from lockstep.rl.types import Prompt, Rollout

MODEL = ModelConfig(
    layers=2, width=12, heads=4, kv_heads=2, head_dim=4, intermediate=10, vocabulary=31, context=64, tied=True
)
LAYOUTS = [Layout(), Layout(tensor=2), Layout(data=2), Layout(pipeline=2)]


def rollout(prompt: int, tokens: tuple[int, ...]) -> Rollout:
    asked = Prompt(prompt, "", tuple(range(1, 4 + prompt)), "")
    return Rollout(0, tokens, (0.0,) * len(tokens), "", "stop", (0,) * len(tokens), prompt=asked)


ROLLOUTS = [
    rollout(p, tuple(5 + (p * 7 + s * 3 + i) % 26 for i in range(1 + s + p))) for p in range(3) for s in range(3)
]


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 30), min_size=1, max_size=9)), min_size=1))
def test_each_number_comes_back_to_its_token(drawn: list[tuple[int, list[int]]]) -> None:
    rollouts = [rollout(prompt, tuple(tokens)) for prompt, tokens in drawn]
    shares = rows_for_ranks(of_tokens(rollouts), RowRules(ranks=2, budget=24, multiple=4))
    found = [scores_of(rows, [row.targets.astype(np.float32) for row in rows]) for rows in shares]
    columns_ = columns(found, [len(r.tokens) for r in rollouts])
    assert [tuple(column.astype(int)) for column in columns_] == [r.tokens for r in rollouts]


def test_numbers_above_those_that_fp32_tells_apart_come_back() -> None:
    """More than 2²⁴ tokens, of which the last ones would share their numbers in fp32."""
    lengths = [1 << 24, 3, 2]
    texts = [([1], array("q", range(length) if length < 9 else bytes(8 * length))) for length in lengths]
    samples = of_completions(texts)[1:]
    [rows] = rows_for_ranks(samples, RowRules(budget=8, multiple=4))
    numbers, scores = scores_of(rows, [row.targets.astype(np.float32) for row in rows])
    first = np.arange(lengths[0]), np.zeros(lengths[0], np.float32)
    _, *found = columns([first, (numbers, scores)], lengths)
    assert [column.tolist() for column in found] == [[0, 1, 2], [0, 1]]


def scored(groups: Groups, head: str, answers: bool) -> tuple[Ints, Floats]:
    layout = groups.layout
    stage = build(MODEL, groups, torch.float32, RandomWeights(MODEL, seed=1), head=head)  # type: ignore[arg-type]
    for parameter in (p for m in stage.module.modules() if isinstance(m, ValueHead) for p in m.parameters()):
        with torch.no_grad():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 10)
    samples = of_answers(ROLLOUTS) if answers else of_tokens(ROLLOUTS)
    rows = rows_for_ranks(samples, row_rules(layout, 64))[layout.data_rank(groups.rank)]
    found = [each.detach().numpy() for each in score(stage, groups, rows, 1.3)]
    return scores_of(rows, found)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("head", "answers"), [("vocabulary", False), ("value", False), ("value", True)])
def test_scores_equal_plain_forward_passes(
    layout: Layout, head: str, answers: bool, worlds: RankPool, groups: Groups
) -> None:
    lengths = [1 if answers else len(r.tokens) for r in ROLLOUTS]
    found = columns(worlds.run(layout, scored, head, answers), lengths)
    for each, column in zip(ROLLOUTS, found, strict=True):
        np.testing.assert_allclose(column, plain(groups, each, head, answers), atol=1e-5)


def plain(groups: Groups, each: Rollout, head: str, answers: bool) -> Floats:
    """One forward pass of the text alone."""
    transformer = transformer_of(build(MODEL, groups, torch.float32, RandomWeights(MODEL, seed=1)))
    text, first = torch.tensor(each.prompt.tokens + each.tokens), len(each.prompt.tokens)
    with torch.no_grad():
        hidden = transformer(text, torch.arange(len(text)), DocumentAttention([[len(text)]], text.device))[:, 0]
    if head == "value":
        values = hidden @ (torch.arange(MODEL.width) / 10)
        found = values[-1:] if answers else values[first - 1 : -1]
    else:
        logits = (hidden @ transformer.head_weight.T)[:, : MODEL.vocabulary] / 1.3
        found = logits.log_softmax(-1)[first - 1 : -1].gather(1, text[first:, None])[:, 0]
    return found.detach().numpy()
