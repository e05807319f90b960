"""Checkpoints: saved in one layout and loaded in another bit for bit, whole or not there at all."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.arrays import (
    LARGEST_CHUNK,
    LARGEST_INNER,
    ArrayFolder,
    BadArray,
    chunk_shape,
    inner_shape,
)
from lockstep.distributed.checkpoint.manager import BadCheckpoint, Checkpoint, find
from lockstep.distributed.checkpoint.reshard import WEIGHTS, FlatShard, chunks_of, fill, whole_chunks
from lockstep.distributed.checkpoint.saver import CheckpointConfig, SaveFailed, Saver
from lockstep.distributed.checkpoint.storage import Storage, storage_of
from lockstep.distributed.checkpoint.tensors import (
    Box,
    Piece,
    WeightsOnly,
    digest,
    overlap,
    read_tensor,
    to_numpy,
    to_torch,
    whole,
    within,
)
from lockstep.distributed.layout import Layout
from lockstep.distributed.optimizer.parameter_marks import is_expert
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, MoEConfig
from lockstep.model.loading import build, transformer_of
from lockstep.model.state_dict import pieces, pieces_by_parameter
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.model.weights.names import logical_tensors

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


def kept(transformer: Transformer) -> Iterator[FlatShard]:
    """All weights, of which every replica has all."""
    groups = transformer.groups
    for parameter in transformer.parameters():
        replicas = groups.expert_replicas if is_expert(parameter) else groups.replicas
        values = {WEIGHTS: parameter.detach().view(-1)}
        yield FlatShard(parameter, parameter.shape, (0, parameter.numel()), replicas, values)


def written(groups: Groups, folder: Path) -> int:
    """Save random weights of all models from all ranks; returns how many bytes this rank wrote."""
    written = 0
    for name, model in MODELS.items():
        transformer = transformer_of(build(model, groups, dtype_of(groups.layout), RandomWeights(model, seed=1)))
        chunks = whole_chunks(kept(transformer), pieces_by_parameter(transformer))
        saver = Saver(folder / name, rank=groups.rank, ranks=groups.layout.processes, barrier=dist.barrier)
        saver.save(7, chunks, {}, {"note.txt": "ä"})
        written += sum(chunk.values.nbytes for chunk in chunks)
    return written


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
def saved(worlds: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, tuple[Path, list[Any]]]:
    """Each layout's checkpoints of both models, and which parts its ranks wrote."""
    folders = {layout: tmp_path_factory.mktemp("saved") for layout in LAYOUTS}
    return {layout: (folder, worlds.run(layout, written, folder)) for layout, folder in folders.items()}


@pytest.mark.parametrize("target", LAYOUTS, ids=str)
def test_any_layout_loads_what_any_layout_saved(
    target: Layout, saved: dict[Layout, tuple[Path, list[Any]]], worlds: RankPool
) -> None:
    folders = [(folder, dtype_of(source)) for source, (folder, _) in saved.items()]
    for held, wrong in worlds.run(target, differing, folders):
        assert held > len(folders) * 20
        assert wrong == []


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_manifest_says_what_lies_there(
    name: str, source: Layout, saved: dict[Layout, tuple[Path, list[Any]]]
) -> None:
    stored = Checkpoint(saved[source][0] / name)
    shapes = logical_tensors(MODELS[name])
    folder = Path(str(stored.place))
    assert {p.name for p in (folder / "arrays").iterdir()} == stored.tensors.keys() == shapes.keys()
    assert stored.files == {"note.txt": "ä"}
    assert sorted(p.name for p in folder.iterdir()) == ["arrays", "manifest.json", "note.txt"]
    for tensor, entry in stored.tensors.items():
        assert tuple(entry["shape"]) == shapes[tensor]
        assert entry["dtype"] == str(dtype_of(source)).removeprefix("torch.")
        corners = itertools.product(
            *(range(0, n, step) for n, step in zip(shapes[tensor], entry["chunk"], strict=True))
        )
        for corner, expected in zip(corners, entry["digests"], strict=True):
            ends = (min(c + s, n) for c, s, n in zip(corner, entry["chunk"], shapes[tensor], strict=True))
            assert digest(stored.read(tensor, tuple(zip(corner, ends, strict=True)))) == expected


def test_replicas_share_the_writing(saved: dict[Layout, tuple[Path, list[Any]]]) -> None:
    first, second = saved[Layout(data=2)][1]
    assert 0.9 < first / second < 1.1


@pytest.fixture(params=["folder", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A folder of checkpoints, and a key-value store in which nothing can be renamed."""
    return storage_of(tmp_path if request.param == "folder" else f"file://{tmp_path}/")


def save_alone(checkpoints: Path, step: int, value: float = 1.0, **arrays: torch.Tensor) -> Path:
    """A checkpoint of one process in a folder."""
    return Path(str(save_in(storage_of(checkpoints), step, value, **arrays)))


def save_in(checkpoints: Storage, step: int, value: float = 1.0, **arrays: torch.Tensor) -> Storage:
    """A checkpoint of one process."""
    held = arrays or {"w": torch.full((4, 3), value)}
    chunks = [chunk for name, tensor in held.items() for chunk in chunks_of(tensor, name)]
    return Saver(checkpoints).save(step, chunks, {"kind": "test"}, {})


def test_a_save_that_was_interrupted_is_never_found(tmp_path: Path) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    for calls in range(2):
        barriers = iter([lambda: None] * calls)
        saver = Saver(tmp_path, ranks=1 + calls, barrier=lambda b=barriers: next(b, killed)())
        if calls:  # the other rank never says that it is done
            saver._closed.set()
        with pytest.raises((KeyboardInterrupt, SaveFailed)):
            saver.save(calls, chunks_of(torch.ones(2), "w"), {}, {})
        assert (tmp_path / f"{manager.step_name(calls)}.partial").is_dir()
        with pytest.raises(BadCheckpoint, match="holds no checkpoint"):
            find(tmp_path)
    finished = save_alone(tmp_path, 2)
    assert find(tmp_path) == storage_of(finished)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000002"]


def test_what_is_written_in_the_background_is_a_copy(tmp_path: Path) -> None:
    saver, tensor = Saver(tmp_path), torch.arange(12.0).view(4, 3)
    for step in (1, 2):
        saver.save(step, chunks_of(tensor, "w"), {}, {}, wait=False)
        saver.copied()
        tensor += 100
    saver.close()
    for step in (1, 2):
        stored = Checkpoint(tmp_path / manager.step_name(step)).read("w", ((0, 4), (0, 3)))
        np.testing.assert_array_equal(stored, np.arange(12).reshape(4, 3) + 100 * (step - 1))


def test_a_save_that_fails_in_the_background_is_told_by_the_next(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1, [*chunks_of(torch.ones(2), "w")] * 2, {}, {}, wait=False)
    with pytest.raises(SaveFailed, match="step-000001 was not saved: a chunk of w was written twice"):
        saver.save(2, chunks_of(torch.ones(2), "w"), {}, {})
    assert not manager.saved(storage_of(tmp_path))


def test_the_failure_of_a_rank_fails_the_save(place: Storage) -> None:
    def failed() -> None:
        (place.draft("step-000001") / "parts").write("failed", "rank 1: no space left")

    saver = Saver(place, ranks=2, barrier=failed)
    with pytest.raises(SaveFailed, match="was not saved: rank 1: no space left"):
        saver.save(1, chunks_of(torch.ones(2), "w"), {}, {})
    assert not manager.saved(place)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(0, 0, [1, 2, 3, 4, 5, 6]), (2, 0, [2, 5, 6]), (1, 3, [2, 3, 6]), (9, 0, [1, 2, 3, 4, 5, 6])],
)
def test_old_checkpoints_go(keep_last: int, keep_every: int, left: list[int], place: Storage, tmp_path: Path) -> None:
    saver = Saver(place, CheckpointConfig(keep_last=keep_last, keep_every=keep_every))
    for step in range(1, 7):
        saver.save(step, chunks_of(torch.ones(2), "w"), {}, {}, best=step == 2)
    assert sorted(manager.saved(place)) == left
    keys = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if not path.is_dir()}
    assert keys | {"best", "latest"} == {manager.step_name(s) for s in left} | {"best", "latest"}
    assert place.pointed("best") == "step-000002"
    assert place.pointed("latest") == "step-000006"


def test_what_an_interrupted_save_left_is_not_mixed_in(place: Storage) -> None:
    for step in (2, 3):
        (place.draft(manager.step_name(step)) / "arrays" / "w").write("zarr.json", "{}")
        assert not manager.saved(place)
    saved = save_in(place, 3, 5.0)
    assert (Checkpoint(saved).read("w", ((0, 4), (0, 3))) == 5).all()
    assert not (place.draft("step-000002") / "arrays" / "w").has("zarr.json")


def test_a_step_that_is_saved_again_is_replaced(place: Storage) -> None:
    save_in(place, 1, 1.0, w=torch.ones(5), more=torch.ones(2))
    saved = Checkpoint(save_in(place, 1, 2.0))
    assert saved.tensors.keys() == {"w"}
    assert (saved.read("w", ((0, 4), (0, 3))) == 2).all()
    assert not (saved.place / "arrays" / "more").has("zarr.json")


def test_latest_points_to_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (5, 90, 1_000_000):
        path = save_alone(run / "checkpoints", step, float(step))
        assert (run / "checkpoints" / "latest").readlink() == Path(path.name)
        for where in (path, f"file://{path}", run, run / "checkpoints", run / "checkpoints" / "latest"):
            found = Checkpoint(where)
            assert found.manifest.items() >= {"format": 2, "step": step, "files": [], "kind": "test"}.items()
            assert (found.read("w", ((1, 3), (0, 2))) == step).all()
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if not p.is_symlink()) == [
        "step-000005",
        "step-000090",
        "step-1000000",
    ]


def test_checkpoints_of_steps_that_were_taken_back_are_dropped(place: Storage, tmp_path: Path) -> None:
    manager.drop_after(place, 0)  # there are none yet
    for step in (2, 10, 4):
        save_in(place, step)
    place.point("best", "step-000010")
    manager.drop_after(place, 5)
    assert sorted(manager.saved(place)) == [2, 4]
    assert place.pointed("best") is None
    assert place.pointed("latest") == "step-000004"
    assert find(place) == place / "step-000004"
    manager.drop_after(place, 0)
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


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


def test_a_chunk_that_is_gone_is_an_error_and_no_zeros(tmp_path: Path) -> None:
    saved = save_alone(tmp_path, 1, w=torch.zeros(4, 3))
    assert (Checkpoint(saved).read("w", ((0, 4), (0, 3))) == 0).all()
    (chunk,) = (p for p in (saved / "arrays" / "w").rglob("*") if p.is_file() and p.name != "zarr.json")
    chunk.unlink()
    with pytest.raises(BadArray, match="arrays/w has a chunk that is missing or damaged"):
        Checkpoint(saved).read("w", ((1, 2), (0, 3)))


def test_a_damaged_manifest_is_one_sentence(tmp_path: Path) -> None:
    file = save_alone(tmp_path, 1) / "manifest.json"
    file.write_text(file.read_text()[:-3])
    with pytest.raises(BadCheckpoint, match=r"manifest.json is damaged"):
        Checkpoint(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    saved = save_alone(tmp_path, 1)
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(manifest | {"format": 3}))
    with pytest.raises(BadCheckpoint, match="has format 3, and this program reads format 2"):
        Checkpoint(tmp_path)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="has no tensor nothing"):
        ArrayFolder(storage_of(save_alone(tmp_path, 1) / "arrays")).read("nothing", ((0, 1),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_bit_pattern_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    tensor = (bits << 16).view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(torch.bfloat16)
    saved = save_alone(tmp_path, 1, w=tensor.view(256, 256))
    back = Checkpoint(saved).read("w", ((0, 256), (0, 256)))
    assert digest(back) == digest(to_numpy(tensor.view(256, 256)))
    assert digest(to_numpy(to_torch(back))) == digest(back)


@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_read_into_memory_is_what_torch_copies(saved: torch.dtype, into: torch.dtype, tmp_path: Path) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    numbers = ((bits << 16) + 0x7FFF * (bits % 3)).view(torch.float32).view(256, 256)
    numbers = numbers[numbers.isfinite().all(1)].to(saved)
    rows, box = len(numbers), ((3, 200), (5, 250))
    checkpoint = Checkpoint(save_alone(tmp_path, 1, w=numbers))
    room = torch.full((300, 700), 7.0, dtype=into)
    read_tensor(checkpoint, "w", box, room[10:207, 1:491:2])
    expected = torch.full((300, 700), 7.0, dtype=into)
    expected[10:207, 1:491:2] = numbers[3:200, 5:250]
    assert rows > 200
    assert digest(to_numpy(room)) == digest(to_numpy(expected))


@given(st.data(), st.integers(1, 7), st.integers(1, 5))
def test_any_run_of_a_parameter_is_filled_and_what_belongs_to_nothing_is_zero(
    data: st.DataObject, rows: int, columns: int
) -> None:
    """A parameter of two tensors one after the other, and rows of padding, as a fused and padded one is."""
    tensors = {name: torch.arange(rows * columns).view(rows, columns) + 1.0 + 100 * i for i, name in enumerate("ab")}
    shape, box = (2 * rows + 2, columns), whole((rows, columns))
    pieces = [
        Piece(name, (rows, columns), box, ((i * rows, (i + 1) * rows), (0, columns)), (rows, columns))
        for i, name in enumerate("ab")
    ]
    flat = torch.cat([*tensors.values(), torch.zeros(2, columns)]).view(-1)
    start = data.draw(st.integers(0, len(flat) - 1))
    stop = data.draw(st.integers(start, len(flat)))
    run = torch.full((stop - start,), torch.nan)
    fill(run, start, shape, pieces, Held({f"exp_avg/{n}": to_numpy(t) for n, t in tensors.items()}), "exp_avg")
    assert torch.equal(run, flat[start:stop])


class Held(WeightsOnly):
    """Arrays as a source."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self._arrays = arrays

    def read(self, name: str, box: Box) -> Any:
        return self._arrays[name][tuple(slice(a, b) for a, b in box)]


tiles = st.lists(st.integers(1, 1 << 16), min_size=1, max_size=2)


@given(tiles, st.sampled_from([2, 4]))
def test_chunks_subdivide_tiles_evenly(tile: list[int], item_bytes: int) -> None:
    chunk = chunk_shape((3 * tile[0], *tile[1:]), tile, item_bytes)
    part = inner_shape(chunk, item_bytes)
    assert chunk[1:] == part[1:] == tuple(tile[1:])
    assert tile[0] % chunk[0] == 0
    assert chunk[0] % part[0] == 0
    # As small as they should be, unless their rows cannot be halved further.
    assert math.prod(chunk) * item_bytes <= LARGEST_CHUNK or chunk[0] % 2 == 1
    assert math.prod(part) * item_bytes <= LARGEST_INNER or part[0] % 2 == 1


@given(tiles, st.sampled_from([2, 4]))
def test_rows_of_one_tile_are_split_whatever_their_number(shape: list[int], item_bytes: int) -> None:
    chunk = chunk_shape(shape, shape, item_bytes)
    part, row_bytes = inner_shape(chunk, item_bytes), math.prod(shape[1:]) * item_bytes
    assert chunk[0] % part[0] == 0
    assert chunk[0] < 2 * shape[0]
    assert math.prod(part) * item_bytes <= max(LARGEST_INNER, 2 * row_bytes)


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
