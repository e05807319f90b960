"""Attention of a split row equals attention of the whole one, forwards and backwards."""

import pytest
import torch
from torch import Tensor

from lockstep.distributed.context_parallel import zigzag_indices
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.attention.context_parallel import RingAttention, UlyssesAttention, attention
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.attention.spec import AttentionSpec
from tests.parameters import every

DOCUMENTS = ((7, 5, 6), (20,), (3, 9), (14, 0, 0))
HEADS, KV_HEADS, WIDTH, LENGTH = 8, 4, 4, 64
SCORINGS = [
    AttentionSpec(),
    AttentionSpec(scale=0.3),
    AttentionSpec(cap=1.5),
    AttentionSpec(window=4),
    AttentionSpec(0.7, 2.0, 9),
]


def drawn() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(LENGTH, heads, WIDTH, generator=draw) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def attended(groups: Groups, spec: AttentionSpec, dtype: torch.dtype) -> list[Tensor]:
    """Mixed values of this rank's tokens and the gradients of its queries, keys and values."""
    places = zigzag_indices(LENGTH, groups.layout.context, groups.context_rank)
    *inputs, weight = (t[places].to(dtype) for t in drawn())
    inputs = [t.requires_grad_() for t in inputs]
    attend = attention(DOCUMENTS, groups, KV_HEADS, inputs[0].device)
    kind = UlyssesAttention if groups.layout.context_by == "heads" else RingAttention
    assert isinstance(attend, kind)
    mixed = attend(0, *inputs, spec)
    (mixed * weight).sum().backward()
    return [mixed.detach(), *(t.grad for t in inputs if t.grad is not None)]


def whole(spec: AttentionSpec) -> list[Tensor]:
    *inputs, weight = drawn()
    inputs = [t.requires_grad_() for t in inputs]
    mixed = DocumentAttention(DOCUMENTS, torch.device("cpu"))(0, *inputs, spec)
    (mixed * weight).sum().backward()
    return [mixed.detach(), *(t.grad for t in inputs if t.grad is not None)]


@pytest.mark.parametrize(
    ("layout", "spec"),
    every(
        [Layout(context=degree, context_by=by) for by in ("heads", "ring") for degree in (2, 4)],
        SCORINGS,
        part=lambda layout, spec: layout.context == 2 or spec == SCORINGS[0],
    ),
    ids=str,
)
def test_a_split_row_attends_as_the_whole_one(layout: Layout, spec: AttentionSpec, worlds: RankPool) -> None:
    parts = worlds.run(layout, attended, spec, torch.float32)
    places = torch.cat([zigzag_indices(LENGTH, layout.context, rank) for rank in range(layout.context)])
    assert sorted(places.tolist()) == list(range(LENGTH))
    for found, expected in zip(zip(*parts, strict=True), whole(spec), strict=True):
        torch.testing.assert_close(torch.cat(found)[places.argsort()], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["heads", "ring"])
def test_in_bf16_a_split_row_attends_as_the_whole_one_to_its_precision(kind: str, worlds: RankPool) -> None:
    layout = Layout(context=2, context_by=kind)
    parts = worlds.run(layout, attended, AttentionSpec(), torch.bfloat16)
    places = torch.cat([zigzag_indices(LENGTH, 2, rank) for rank in range(2)])
    for found, expected in zip(zip(*parts, strict=True), whole(AttentionSpec()), strict=True):
        mixed = torch.cat(found)[places.argsort()]
        assert mixed.dtype == torch.bfloat16
        torch.testing.assert_close(mixed.float(), expected, rtol=0.02, atol=0.06)
