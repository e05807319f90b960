"""Checkpoints: saved in one layout and loaded in another bit for bit, whole or not there at all."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.manager import BadCheckpoint, Checkpoint, find, save
from lockstep.distributed.checkpoint.spec import Box, Piece, digest, overlap, to_numpy, to_torch, whole, within
from lockstep.distributed.checkpoint.store import LARGEST_CHUNK, ArrayFolder, chunk_shape
from lockstep.distributed.groups import Groups
from lockstep.distributed.layout import Layout
from lockstep.distributed.worlds import Worlds
from lockstep.model.config import ModelConfig, MoEConfig
from lockstep.model.names import RandomWeights, logical_tensors, pieces
from lockstep.model.train import build, transformer_of

SIZES: dict[str, Any] = {"width": 12, "heads": 4, "kv_heads": 2, "head_dim": 4, "intermediate": 10, "context": 8}
MODELS = {
    "tied": ModelConfig(layers=3, vocabulary=31, tied=True, **SIZES),
    "untied": ModelConfig(layers=2, vocabulary=33, tied=False, **SIZES),
    "experts": ModelConfig(
        layers=2,
        vocabulary=33,
        moe=MoEConfig(experts=4, experts_per_token=2, intermediate=6, shared_intermediate=4, shared_gate=True),
        **SIZES,
    ),
}
LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(data=2),
    Layout(tensor=2, pipeline=2),
    Layout(tensor=2, data=2),
]


def dtype_of(source: Layout) -> torch.dtype:
    """What a layout's checkpoints are written in here, so that both dtypes come up."""
    return torch.bfloat16 if source.data == 2 else torch.float32


def written(groups: Groups, folder: Path) -> list[tuple[str, str, Box]]:
    """Save random weights of both models from all ranks; returns the parts that this rank owned."""
    owned = []
    for name, model in MODELS.items():
        transformer = transformer_of(build(model, groups, dtype_of(groups.layout), RandomWeights(model, seed=1)))
        files = {"note.txt": "ä"}
        save(folder / name, 7, pieces(transformer), {}, files, rank=groups.rank, barrier=dist.barrier)
        owned += [(name, piece.name, piece.box) for _, piece in pieces(transformer) if piece.owned]
    return owned


def differing(groups: Groups, folders: list[tuple[Path, torch.dtype]]) -> tuple[int, list[str]]:
    """Load checkpoints; how many pieces this rank holds, and those whose bits are not the random weights'."""
    held, wrong = 0, []
    for (folder, dtype), (name, model) in itertools.product(folders, MODELS.items()):
        transformer = transformer_of(build(model, groups, dtype, Checkpoint(folder / name)))
        expected = RandomWeights(model, seed=1)
        for parameter, piece in pieces(transformer):
            held += 1
            bits = to_torch(np.array(expected.read(piece.name, piece.box))).to(dtype)
            if not torch.equal(piece.view(parameter), bits):
                wrong.append(f"{folder} {name} {piece.name} {piece.box}")
    return held, wrong


@pytest.fixture(scope="module")
def saved(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, tuple[Path, list[Any]]]:
    """Each layout's checkpoints of both models, and which parts its ranks wrote."""
    folders = {layout: tmp_path_factory.mktemp("saved") for layout in LAYOUTS}
    return {layout: (folder, worlds.run(layout, written, folder)) for layout, folder in folders.items()}


@pytest.mark.parametrize("target", LAYOUTS, ids=str)
def test_any_layout_loads_what_any_layout_saved(
    target: Layout, saved: dict[Layout, tuple[Path, list[Any]]], worlds: Worlds
) -> None:
    folders = [(folder, dtype_of(source)) for source, (folder, _) in saved.items()]
    for held, wrong in worlds.run(target, differing, folders):
        assert held > len(folders) * 20
        assert wrong == []


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_part_of_every_tensor_is_written_once(
    name: str, source: Layout, saved: dict[Layout, tuple[Path, list[Any]]]
) -> None:
    folder, ranks = saved[source]
    for tensor, shape in logical_tensors(MODELS[name]).items():
        count = np.zeros(shape, int)
        for box in (box for rank in ranks for n, t, box in rank if (n, t) == (name, tensor)):
            count[tuple(slice(a, b) for a, b in box)] += 1
        assert (count == 1).all(), tensor
    stored = Checkpoint(folder / name)
    assert {p.name for p in (stored.path / "arrays").iterdir()} == set(logical_tensors(MODELS[name]))
    assert stored.files == {"note.txt": "ä"}


def save_alone(checkpoints: Path, step: int, value: float = 1.0, **arrays: torch.Tensor) -> Path:
    """A checkpoint of one process."""
    held = arrays or {"w": torch.full((4, 3), value)}
    shaped = [(t, Piece(n, tuple(t.shape), whole(t.shape), whole(t.shape), tuple(t.shape))) for n, t in held.items()]
    return save(checkpoints, step, shaped, {"kind": "test"}, {}, rank=0, barrier=lambda: None)


def test_a_save_that_was_interrupted_is_never_found(tmp_path: Path) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    for calls in range(3):
        barriers = iter([lambda: None] * calls)
        tensor = torch.ones(2)
        held = [(tensor, Piece("w", (2,), whole((2,)), whole((2,)), (2,)))]
        if calls < 2:
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, calls, held, {}, {}, rank=0, barrier=lambda b=barriers: next(b, killed)())
            assert (tmp_path / f"{manager.step_name(calls)}.partial").is_dir()
            with pytest.raises(BadCheckpoint, match="holds no checkpoint"):
                find(tmp_path)
    finished = save_alone(tmp_path, 2)
    assert find(tmp_path) == finished
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000002"]


def test_what_an_interrupted_save_left_is_not_mixed_in(tmp_path: Path) -> None:
    rest = tmp_path / "step-000003.partial" / "arrays" / "w"
    rest.mkdir(parents=True)
    (rest / "zarr.json").write_text("{}")
    saved = save_alone(tmp_path, 3, 5.0)
    assert (Checkpoint(saved).read("w", ((0, 4), (0, 3))) == 5).all()
    assert not (tmp_path / "step-000003.partial").exists()


def test_latest_points_to_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (5, 90, 1_000_000):
        saved = save_alone(run / "checkpoints", step, float(step))
        assert (run / "checkpoints" / "latest").readlink() == Path(saved.name)
        for path in (saved, run, run / "checkpoints", run / "checkpoints" / "latest"):
            found = Checkpoint(path)
            assert found.manifest == {"format": 1, "step": step, "files": [], "kind": "test"}
            assert (found.read("w", ((1, 3), (0, 2))) == step).all()
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if not p.is_symlink()) == [
        "step-000005",
        "step-000090",
        "step-1000000",
    ]


def test_checkpoints_of_steps_that_were_taken_back_are_dropped(tmp_path: Path) -> None:
    manager.drop_after(tmp_path, 0)  # there are none yet
    for step in (2, 10, 4):
        save_alone(tmp_path, step)
    manager.drop_after(tmp_path, 5)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000002", "step-000004"]
    assert (tmp_path / "latest").resolve() == find(tmp_path) == tmp_path / "step-000004"
    manager.drop_after(tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_a_step_saved_again_replaces_the_old(tmp_path: Path) -> None:
    save_alone(tmp_path, 1, 1.0)
    save_alone(tmp_path, 1, 2.0)
    assert (Checkpoint(tmp_path).read("w", ((0, 4), (0, 3))) == 2).all()


def test_a_flipped_bit_is_an_error(tmp_path: Path) -> None:
    saved = save_alone(tmp_path, 1, w=torch.arange(12.0).view(4, 3))
    (chunk,) = (p for p in (saved / "arrays" / "w").rglob("*") if p.is_file() and p.name != "zarr.json")
    content = chunk.read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        chunk.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"(?i)crc32c|checksum|digest"):
            Checkpoint(saved).read("w", ((0, 4), (0, 3)))
    chunk.write_bytes(content)
    assert Checkpoint(saved).read("w", ((0, 4), (0, 3))).sum() == 66


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    saved = save_alone(tmp_path, 1)
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(BadCheckpoint, match="has format 2, and this program reads format 1"):
        Checkpoint(tmp_path)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="has no tensor nothing"):
        ArrayFolder(save_alone(tmp_path, 1) / "arrays").read("nothing", ((0, 1),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_bit_pattern_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    tensor = (bits << 16).view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(torch.bfloat16)
    saved = save_alone(tmp_path, 1, w=tensor.view(256, 256))
    back = Checkpoint(saved).read("w", ((0, 256), (0, 256)))
    assert digest(back) == digest(to_numpy(tensor.view(256, 256)))
    assert digest(to_numpy(to_torch(back))) == digest(back)


@given(st.lists(st.integers(1, 1 << 16), min_size=1, max_size=2), st.sampled_from([2, 4]))
def test_chunks_subdivide_tiles_evenly(tile: list[int], item_bytes: int) -> None:
    chunk = chunk_shape(tuple(tile), item_bytes)
    assert chunk[1:] == tuple(tile[1:])
    assert tile[0] % chunk[0] == 0
    # As small as it should be, unless its rows cannot be halved further.
    assert math.prod(chunk) * item_bytes <= LARGEST_CHUNK or chunk[0] % 2 == 1


intervals = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda p: (min(p), max(p) + 1))
boxes = st.tuples(intervals, intervals)


def cells(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(a, b) for a, b in box)))


@given(boxes, boxes)
def test_overlap_is_the_intersection_of_cells(a: Box, b: Box) -> None:
    common = overlap(a, b)
    assert (set() if common is None else cells(common)) == cells(a) & cells(b)
    assert common == overlap(b, a)


@given(boxes, boxes)
def test_within_selects_the_common_part_from_either_box(a: Box, b: Box) -> None:
    common = overlap(a, b)
    array = np.arange(100).reshape(10, 10)
    if common is not None:
        part_of_a, part_of_b, expected = (array[tuple(slice(*i) for i in box)] for box in (a, b, common))
        assert np.array_equal(part_of_a[within(common, a)], expected)
        assert np.array_equal(part_of_b[within(common, b)], expected)
