"""Weights from any layout of the policy to a whole model, bit for bit, or an error."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.distributed.checkpoint.spec import Box, digest
from lockstep.distributed.groups import Groups
from lockstep.distributed.layout import Layout
from lockstep.distributed.worlds import Worlds
from lockstep.model.config import ModelConfig
from lockstep.model.names import RandomWeights, logical_tensors
from lockstep.model.train import build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.rl.sync import Shard, Shards, WeightsDiffer, receive, shards_of
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
    layout: Layout, tied: bool, dtype: torch.dtype, worlds: Worlds, groups: Groups
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


def test_a_missing_part_of_a_tensor_is_noticed(worlds: Worlds, groups: Groups) -> None:
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


@st.composite
def partition(draw: st.DrawFn, rows: int, columns: int) -> list[Box]:
    """Boxes that tile a matrix: bands of rows, each cut into columns of its own."""
    found: list[Box] = []
    cuts = sorted(draw(st.sets(st.integers(1, rows - 1)))) if rows > 1 else []
    for top, bottom in zip([0, *cuts], [*cuts, rows], strict=True):
        inner = sorted(draw(st.sets(st.integers(1, columns - 1)))) if columns > 1 else []
        found += [((top, bottom), (a, b)) for a, b in zip([0, *inner], [*inner, columns], strict=True)]
    return draw(st.permutations(found))


def shard(array: np.ndarray, box: Box) -> Shard:
    part = array[tuple(slice(a, b) for a, b in box)].copy()
    return Shard("w", box, part, False, digest(part))


@given(st.data(), st.integers(1, 7), st.integers(1, 6))
def test_any_box_is_read_from_any_tiling(data: st.DataObject, rows: int, columns: int) -> None:
    array = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    tiles = data.draw(partition(rows, columns))
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    box = ((top, data.draw(st.integers(top + 1, rows))), (left, data.draw(st.integers(left + 1, columns))))
    wanted = array[top : box[0][1], left : box[1][1]]
    assert np.array_equal(Shards([shard(array, tile) for tile in tiles]).read("w", box), wanted)
    gone = data.draw(st.sampled_from(tiles))
    with pytest.raises(WeightsDiffer, match="elements of w"):
        Shards([shard(array, tile) for tile in tiles if tile != gone]).read("w", gone)
