"""Weights from any layout of the policy to a whole model, bit for bit, or an error."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.distributed.checkpoint.tensors import Box, digest
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig
from lockstep.model.loading import build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.model.weights.names import logical_tensors
from lockstep.rl.weight_sync.parameters import receive
from lockstep.rl.weight_sync.protocol import Shard, WeightsDiffer
from lockstep.rl.weight_sync.shards import messages_of, shards_of, signed
from tests.parameters import every


def model(tied: bool) -> ModelConfig:
    return ModelConfig(
        layers=3,
        width=12,
        heads=4,
        kv_heads=2,
        head_dim=4,
        intermediate=10,
        vocabulary=31,
        context=8,
        tied=tied,
    )


def transformer(groups: Groups, tied: bool, dtype: torch.dtype, seed: int) -> Transformer:
    return transformer_of(build(model(tied), groups, dtype, RandomWeights(model(tied), seed)))


def sent(groups: Groups, tied: bool, dtype: torch.dtype) -> list[Shard]:
    return shards_of(transformer(groups, tied, dtype, seed=1))


def bits(of: Transformer) -> dict[str, str]:
    return {s.name: digest(s.bits) for s in shards_of(of)}


@pytest.mark.parametrize(
    ("layout", "tied", "dtype"),
    every(
        [Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(data=2), Layout(tensor=2, pipeline=2)],
        [True, False],
        [torch.float32, torch.bfloat16],
        part=lambda layout, tied, dtype: (
            tied == (layout.pipeline == 1) and (dtype == torch.float32) == (layout.data == 1)
        ),
    ),
    ids=str,
)
def test_a_whole_model_receives_what_any_layout_sends(
    layout: Layout, tied: bool, dtype: torch.dtype, worlds: RankPool, groups: Groups
) -> None:
    shards = [shard for part in worlds.run(layout, sent, tied, dtype) for shard in part]
    policy, worker = (transformer(groups, tied, dtype, seed) for seed in (1, 2))
    assert bits(worker) != bits(policy)
    receive(worker, shards)
    assert bits(worker) == bits(policy)
    assert set(bits(worker)) == set(logical_tensors(model(tied)))
    sizes = sum(shard.bits.size for shard in shards)
    assert sizes == model(tied).parameters, "something was sent twice"


@pytest.fixture
def shards(groups: Groups) -> list[Shard]:
    """Copies: shards of this process's own transformer share its memory."""
    return [replace(s, bits=s.bits.copy()) for s in sent(groups, True, torch.bfloat16)]


def test_every_missing_shard_is_noticed(shards: list[Shard], groups: Groups) -> None:
    for i, missing in enumerate(shards):
        worker = transformer(groups, True, torch.bfloat16, seed=1)  # it has the right weights, but was not sent them
        with pytest.raises(WeightsDiffer, match=f"0 of {missing.bits.size} elements of {missing.name}"):
            receive(worker, shards[:i] + shards[i + 1 :])


def test_a_missing_part_of_a_tensor_is_noticed(worlds: RankPool, groups: Groups) -> None:
    halves = [s for part in worlds.run(Layout(tensor=2), sent, True, torch.float32) for s in part]
    halves.remove(next(s for s in reversed(halves) if s.name.endswith("o_proj.weight")))
    with pytest.raises(WeightsDiffer, match="96 of 192 elements"):
        receive(transformer(groups, True, torch.float32, seed=1), halves)


@pytest.mark.parametrize("place", [0, 17, -1])
def test_an_altered_bit_is_noticed(place: int, shards: list[Shard], groups: Groups) -> None:
    for shard in (shards[0], shards[len(shards) // 2]):
        shard.bits.reshape(-1).view(np.uint8)[place] ^= 1
        with pytest.raises(WeightsDiffer, match="differs from what the policy sent"):
            receive(transformer(groups, True, torch.bfloat16, seed=1), shards)
        shard.bits.reshape(-1).view(np.uint8)[place] ^= 1
    receive(transformer(groups, True, torch.bfloat16, seed=1), shards)


def split(box: Box, dim: int, place: int) -> list[Box]:
    (start, stop) = box[dim]
    return [(*box[:dim], part, *box[dim + 1 :]) for part in ((start, start + place), (start + place, stop))]


@st.composite
def tilings(draw: st.DrawFn, box: Box) -> list[Box]:
    """Boxes that tile a box, cut again and again at any place of any dim."""
    tiles = [box]
    for _ in range(draw(st.integers(0, 4))):
        chosen = tiles.pop(draw(st.integers(0, len(tiles) - 1)))
        dims = [dim for dim, (start, stop) in enumerate(chosen) if stop - start > 1]
        if not dims:
            return [*tiles, chosen]
        dim = draw(st.sampled_from(dims))
        tiles += split(chosen, dim, draw(st.integers(1, chosen[dim][1] - chosen[dim][0] - 1)))
    return draw(st.permutations(tiles))


def cut(shard: Shard, box: Box) -> Shard:
    part = shard.bits[
        tuple(slice(*(p - o[0] for p in places)) for places, o in zip(box, shard.box, strict=True))
    ].copy()
    return replace(shard, box=box, bits=part, digest=digest(part))


@settings(max_examples=40)
@given(data=st.data())
def test_any_tiling_fills_a_model_and_no_part_stands_for_another(data: st.DataObject, groups: Groups) -> None:
    """A part that comes twice is refused, even where another is missing and the number of elements is right."""
    whole = sent(groups, True, torch.float32)
    tiled = data.draw(st.sampled_from(whole))
    tiles = [cut(tiled, box) for box in data.draw(tilings(tiled.box))]
    others = [shard for shard in whole if shard is not tiled]
    worker = transformer(groups, True, torch.float32, seed=2)
    receive(worker, [*others, *tiles])
    assert bits(worker) == {s.name: s.digest for s in whole}
    twice = data.draw(st.sampled_from(tiles))
    with pytest.raises(WeightsDiffer, match="send each part once"):
        receive(worker, [*others, *(tiles if len(tiles) == 1 else tiles[1:]), twice, twice])
    with pytest.raises(WeightsDiffer, match=f"elements of {tiled.name}"):
        receive(worker, [*others, *(tile for tile in tiles if tile is not twice)])


@pytest.mark.parametrize("size", [1, 500, 1 << 20])
def test_messages_hold_every_part_once_and_no_more_than_they_may(size: int, groups: Groups) -> None:
    policy = transformer(groups, True, torch.float32, seed=1)
    messages = [signed(message) for message in messages_of(policy, size)]
    for message in messages:
        assert sum(s.bits.nbytes for s in message) <= size or all(s.box[0][1] - s.box[0][0] == 1 for s in message)
    worker = transformer(groups, True, torch.float32, seed=2)
    receive(worker, [shard for message in messages for shard in message])
    assert bits(worker) == bits(policy)
