"""What an optimizer remembers goes from any layout into any other without a changed bit, and training goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.reshard import FlatShard, fill, whole_chunks
from lockstep.distributed.checkpoint.saver import Saver
from lockstep.distributed.checkpoint.tensors import Piece, WeightsOnly, state_name, to_numpy, whole
from lockstep.distributed.layout import Layout
from lockstep.distributed.optimizer.zero_state import MissingState
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, MoEConfig, describe
from lockstep.model.formats.recast import Recast
from lockstep.model.loading import DTYPES, build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from tests.distributed.test_parity import global_batch

SIZES: dict[str, Any] = {"width": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "intermediate": 20, "context": 64}
MODELS = {
    "dense": ModelConfig(layers=4, vocabulary=61, tied=True, biases=("qkv",), qk_norm="head", **SIZES),
    "experts": ModelConfig(
        layers=2,
        vocabulary=61,
        moe=MoEConfig(experts=4, experts_per_token=2, intermediate=12, shared_intermediate=8, shared_gate=True),
        **SIZES,
    ),
}
DENSE = [
    Layout(),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2, virtual=2),
    Layout(pipeline=4),
    Layout(zero=0),
    Layout(data=2, zero=0),
    Layout(data=2, zero=1),
    Layout(data=4, zero=1),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(data=2, zero=2, offload=True),
    Layout(context=2, zero=2),
    Layout(tensor=2, data=2, zero=3),
    Layout(tensor=2, pipeline=2),
    Layout(pipeline=2, data=2, zero=2),
]
EXPERTS = [
    Layout(),
    Layout(expert=2),
    Layout(expert=2, data=2, zero=0),
    Layout(expert=2, data=2, zero=1),
    Layout(expert=2, tensor=2),
    Layout(expert=2, pipeline=2, zero=2),
    Layout(data=2, zero=3),
]
ADAMW, MUON = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1), OptimizerConfig(kind="muon", learning_rate=1e-3)
Losses = list[tuple[float, float]]


def trainer_of(groups: Groups, name: str, dtype: str, optimizer: OptimizerConfig, source: Any) -> Trainer:
    return Trainer(build(MODELS[name], groups, DTYPES[dtype], source), groups, optimizer)


def steps(trainer: Trainer, first: int, last: int) -> Losses:
    found = []
    for step in range(first, last + 1):
        rows = rows_for_ranks(global_batch(61, step), row_rules(trainer.groups.layout, 64))
        result = trainer.step(rows[trainer.groups.data_rank], nll, 1e-3)
        found.append((result.values["loss"], result.grad_norm))
    return found


def save(trainer: Trainer, folder: Path, step: int) -> None:
    groups = trainer.groups
    saver = Saver(folder, rank=groups.rank, ranks=groups.layout.processes, barrier=dist.barrier)
    said = describe(trainer.transformer.model, groups.layout) | {"updates": trainer.engine.updates}
    saver.save(step, trainer.chunks(state=True), said, {}, wait=False)
    saver.close()


def straight(groups: Groups, folder: Path, *args: Any) -> Losses:
    """Two steps, a checkpoint, and the losses of two more."""
    trainer = trainer_of(groups, *args, RandomWeights(MODELS[args[0]], seed=1))
    steps(trainer, 1, 2)
    save(trainer, folder, 2)
    return steps(trainer, 3, 4)


def resumed(groups: Groups, source: Path, target: Path, *args: Any) -> Losses:
    """Start from a checkpoint, save it once more as it is, and take two steps."""
    checkpoint = Checkpoint(source)
    trainer = trainer_of(groups, *args, checkpoint)
    trainer.restore(checkpoint)
    save(trainer, target, 2)
    return steps(trainer, 3, 4)


def check_equal(a: Checkpoint, b: Checkpoint, kinds: set[str]) -> None:
    """Every array has the same bits, and these kinds of state are there."""
    assert a.updates == b.updates == 2
    assert {name.split("/")[0] for name in a.states} == kinds
    assert a.tensors.keys() == b.tensors.keys()
    for name, entry in a.tensors.items():
        box = whole(tuple(entry["shape"]))
        np.testing.assert_array_equal(a.read(name, box).view(np.uint8), b.read(name, box).view(np.uint8), name)


def check(
    layouts: list[Layout],
    hops: tuple[int, ...],
    worlds: RankPool,
    folder: Path,
    name: str,
    dtype: str,
    optimizer: OptimizerConfig,
) -> None:
    """Every layout's checkpoint goes into the layouts so many places further in the list."""
    arguments = name, dtype, optimizer
    losses = [worlds.run(a, straight, folder / str(i), *arguments)[0] for i, a in enumerate(layouts)]
    kinds = {"momentum"} if optimizer.kind == "muon" else set()
    kinds |= {"exp_avg", "exp_avg_sq"} | ({"master"} if dtype == "bfloat16" else set())
    for i, source in enumerate(layouts):
        for hop in hops:
            j = (i + hop) % len(layouts)
            back = folder / f"{i}-{j}"
            found = worlds.run(layouts[j], resumed, folder / str(i), back, *arguments)[0]
            check_equal(Checkpoint(folder / str(i)), Checkpoint(back), kinds)
            if hop:
                np.testing.assert_allclose(found, losses[i], rtol=2e-5 if dtype == "float32" else 0.03)
            else:
                assert found == losses[i], f"{source} does not go on as it would have"


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "layouts"), [("dense", DENSE), ("experts", EXPERTS)])
def test_any_layout_goes_on_from_every_other(
    name: str, layouts: list[Layout], dtype: str, worlds: RankPool, tmp_path: Path
) -> None:
    check(layouts, tuple(range(len(layouts))), worlds, tmp_path, name, dtype, ADAMW)


@pytest.mark.parametrize(
    ("name", "layouts", "dtype"),
    [
        pytest.param("dense", DENSE[4::5], "bfloat16", marks=pytest.mark.exhaustive),
        ("experts", EXPERTS[1::3], "float32"),
    ],
)
def test_a_layout_goes_on_from_itself_and_another(
    name: str, layouts: list[Layout], dtype: str, worlds: RankPool, tmp_path: Path
) -> None:
    check(layouts, (0, 1), worlds, tmp_path, name, dtype, ADAMW)


def test_muon_goes_on_from_another_layout(worlds: RankPool, tmp_path: Path) -> None:
    check(
        [Layout(tensor=2, sequence=True), Layout(data=2, zero=2)], (0, 1), worlds, tmp_path, "experts", "float32", MUON
    )


def test_an_fp32_run_goes_on_from_the_masters_of_a_bf16_run(worlds: RankPool, tmp_path: Path) -> None:
    worlds.run(Layout(), straight, tmp_path / "a", "dense", "bfloat16", ADAMW)
    worlds.run(Layout(data=2), in_fp32, tmp_path / "a", tmp_path / "b")
    before, after = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")
    for name, entry in after.tensors.items():
        box = whole(tuple(entry["shape"]))
        expected = before.read(name if "/" in name else state_name("master", name), box)
        np.testing.assert_array_equal(after.read(name, box), expected)
    assert not any(name.startswith("master") for name in after.states)


def in_fp32(groups: Groups, source: Path, target: Path) -> None:
    checkpoint = Checkpoint(source)
    trainer = trainer_of(groups, "dense", "float32", ADAMW, Recast(checkpoint, MODELS["dense"], "float32"))
    trainer.restore(checkpoint)
    save(trainer, target, 2)


def without_state(groups: Groups, folder: Path) -> str:
    trainer = trainer_of(groups, "dense", "float32", ADAMW, RandomWeights(MODELS["dense"], seed=1))
    steps(trainer, 1, 1)
    said = {"updates": trainer.engine.updates}
    Saver(folder).save(1, trainer.chunks(state=False), said, {})
    with pytest.raises(MissingState, match=r"no optimizer state for model\.") as caught:
        trainer.restore(Checkpoint(folder))
    return str(caught.value)


def test_a_checkpoint_without_state_is_no_fresh_start_without_a_word(worlds: RankPool, tmp_path: Path) -> None:
    worlds.run(Layout(), without_state, tmp_path)


class Numbered(WeightsOnly):
    """Arrays whose elements count from 0 on, each kind from another number."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def read(self, name: str, box: Any) -> Any:
        kind, _, tensor = name.rpartition("/")
        start = len(kind) * 1_000_000 + int(tensor[1:]) * 10_000
        whole = np.arange(np.prod(self._shapes[tensor]), dtype=np.float32).reshape(self._shapes[tensor]) + start
        return whole[tuple(slice(a, b) for a, b in box)]


def cut_anywhere(groups: Groups, seed: int) -> tuple[dict[str, Any], list[Any]]:
    """Parameters of random shapes, cut at random places: which chunks come out here, and what `fill` reads back."""
    draw = np.random.default_rng(seed)  # the same on every rank
    kept, pieces, wrong = [], {}, []
    ranks, rank = groups.replicas.size(), groups.replicas.rank()
    for number in range(12):
        shape = tuple(int(n) for n in draw.integers(1, 9, draw.integers(1, 4)))
        name, parameter = f"w{number}", nn.Parameter(torch.zeros(0))
        rows = int(draw.integers(0, 5))  # of another tensor, or of padding, before it
        whole_shape = (shape[0] + rows, *shape[1:])
        local = ((rows, rows + shape[0]), *whole(shape[1:]))
        pieces[parameter] = [Piece(name, shape, whole(shape), local, shape)]
        size = int(np.prod(whole_shape))
        cuts = (0, *sorted(int(c) for c in draw.integers(0, size + 1, ranks - 1)), size)
        source = Numbered({name: shape})
        values = {}
        for kind in ("exp_avg", "exp_avg_sq"):
            run = torch.full((cuts[rank + 1] - cuts[rank],), -1.0)
            fill(run, cuts[rank], whole_shape, pieces[parameter], source, kind)
            expected = np.zeros(whole_shape, np.float32)
            expected[rows:] = source.read(state_name(kind, name), whole(shape))
            if not np.array_equal(run.numpy(), expected.reshape(-1)[cuts[rank] : cuts[rank + 1]]):
                wrong.append((name, kind, cuts))
            values[kind] = run
        kept.append(FlatShard(parameter, torch.Size(whole_shape), cuts, groups.replicas, values))
    chunks = {chunk.name: to_numpy(chunk.values) for chunk in whole_chunks(kept, pieces)}
    shapes = {pieces[each.parameter][0].name: pieces[each.parameter][0].shape for each in kept}
    for name, array in chunks.items():
        if not np.array_equal(array, Numbered(shapes).read(name, whole(shapes[name.split("/")[1]]))):
            wrong.append(name)
    return chunks, wrong


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_chunks_are_whole_wherever_parameters_are_cut(ranks: int, worlds: RankPool) -> None:
    for found in zip(*worlds.run(Layout(data=ranks), cut_many_times, 25), strict=True):
        assert not [wrong for _, wrong in found if wrong]
        names = [name for chunks, _ in found for name in chunks]
        assert len(names) == len(set(names)) == 24


def cut_many_times(groups: Groups, times: int) -> list[Any]:
    return [cut_anywhere(groups, seed) for seed in range(times)]
