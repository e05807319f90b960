"""A run goes on from the newest whole checkpoint, whatever happened to newer ones, and from nothing without a word."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lockstep.distributed.checkpoint import integrity
from lockstep.distributed.checkpoint.integrity import damage, newest_whole
from lockstep.distributed.checkpoint.manager import BadCheckpoint
from lockstep.distributed.checkpoint.reshard import chunks_of
from lockstep.distributed.checkpoint.saver import Saver
from lockstep.distributed.checkpoint.storage import Storage, storage_of

ARRAYS = {"w": torch.randn(600, 200), "exp_avg/w": torch.randn(600, 200).abs(), "norm": torch.ones(4).bfloat16()}


@pytest.fixture(params=["folder", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Three checkpoints in a folder, or in a key-value store."""
    found = storage_of(tmp_path if request.param == "folder" else f"file://{tmp_path}/")
    saver = Saver(found)
    for step in (1, 2, 3):
        chunks = [chunk for name, tensor in ARRAYS.items() for chunk in chunks_of(tensor + step, name)]
        saver.save(step, chunks, {}, {"tokenizer.json": '{"model": 1}', "merges.txt": ""})
    return found


def chunk_file(step: Path) -> Path:
    return next(path for path in sorted((step / "arrays" / "w").iterdir()) if path.name.startswith("c."))


def empty_all(step: Path) -> None:
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def truncate(step: Path) -> None:
    path = chunk_file(step)
    path.write_bytes(path.read_bytes()[:-3])


def zero(step: Path) -> None:
    path = chunk_file(step)
    path.write_bytes(bytes(path.stat().st_size))


def flip(step: Path) -> None:
    content = bytearray(chunk_file(step).read_bytes())
    content[len(content) // 2] ^= 4
    chunk_file(step).write_bytes(content)


def swap(step: Path) -> None:
    shutil.copy(chunk_file(step.with_name("step-000001")), chunk_file(step))


def cut_manifest(step: Path) -> None:
    path = step / "manifest.json"
    path.write_text(path.read_text()[:-20])


def forget_tensors(step: Path) -> None:
    path = step / "manifest.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "tensors"}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "all files empty": (empty_all, "its manifest.json is damaged"),
    "manifest empty": (lambda step: (step / "manifest.json").write_text(""), "its manifest.json is damaged"),
    "manifest of zeros": (lambda step: (step / "manifest.json").write_bytes(bytes(99)), "its manifest.json is damaged"),
    "manifest cut off": (cut_manifest, "its manifest.json is damaged"),
    "manifest without arrays": (forget_tensors, "its manifest.json is damaged"),
    "a chunk gone": (lambda step: chunk_file(step).unlink(), "w of its files and arrays are missing or damaged"),
    "a chunk empty": (
        lambda step: chunk_file(step).write_bytes(b""),
        "w of its files and arrays are missing or damaged",
    ),
    "a chunk cut off": (truncate, "w of its files and arrays are missing or damaged"),
    "a chunk of zeros": (zero, "w of its files and arrays are missing or damaged"),
    "a flipped bit": (flip, "w of its files and arrays are missing or damaged"),
    "a chunk of another step": (swap, "w of its files and arrays are missing or damaged"),
    "an array gone": (lambda step: shutil.rmtree(step / "arrays" / "norm"), "norm of its files and arrays are missing"),
    "array's metadata empty": (
        lambda step: (step / "arrays" / "w" / "zarr.json").write_text(""),
        "w of its files and arrays are missing",
    ),
    "all arrays gone": (lambda step: shutil.rmtree(step / "arrays"), "exp_avg/w and 2 more of its files and arrays"),
    "tokenizer empty": (
        lambda step: (step / "tokenizer.json").write_text(""),
        "tokenizer.json of its files and arrays",
    ),
    "tokenizer gone": (lambda step: (step / "tokenizer.json").unlink(), "tokenizer.json of its files and arrays"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(kind: str, place: Storage, tmp_path: Path) -> None:
    harm, reason = DAMAGE[kind]
    harm(tmp_path / "step-000003")
    found = newest_whole(place)
    assert found.place == place / "step-000002"
    assert list(found.damaged) == [3]
    assert str(found).startswith(f"the checkpoint of step 3 is damaged: {reason}")
    harm(tmp_path / "step-000002")
    assert newest_whole(place).place == place / "step-000001"
    assert list(newest_whole(place).damaged) == [3, 2]


@pytest.mark.parametrize("kind", [k for k in DAMAGE if k not in ("a flipped bit", "a chunk of another step")])
def test_a_large_one_is_known_by_what_its_chunks_begin_with(
    kind: str, place: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "READ_WHOLE", 1)
    assert damage(place / "step-000003") is None
    DAMAGE[kind][0](tmp_path / "step-000003")
    assert newest_whole(place).place == place / "step-000002"


def test_what_is_whole_is_taken_and_a_deleted_one_is_none(place: Storage, tmp_path: Path) -> None:
    assert newest_whole(place).place == place / "step-000003"
    shutil.rmtree(tmp_path / "step-000003")
    found = newest_whole(place)
    assert (found.place, dict(found.damaged), str(found)) == (place / "step-000002", {}, "")


def test_a_folder_whose_checkpoints_are_all_gone_says_which_was_the_last(place: Storage, tmp_path: Path) -> None:
    assert newest_whole(place / "elsewhere").left is None
    for step in (1, 2, 3):
        shutil.rmtree(tmp_path / f"step-00000{step}")
    found = newest_whole(place)
    assert (found.place, found.left) == (None, place / "step-000003")


def test_a_step_without_its_manifest_was_deleted_in_a_folder_and_never_saved_in_a_store(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    for step in (1, 2):
        saver.save(step, chunks_of(torch.ones(2), "w"), {}, {})
    (tmp_path / "step-000002" / "manifest.json").unlink()
    (tmp_path / "step-000003.partial").mkdir()
    found = newest_whole(storage_of(tmp_path))
    assert found.place == storage_of(tmp_path) / "step-000001"
    assert dict(found.damaged) == {2: "it has no manifest.json"}
    assert dict(newest_whole(storage_of(f"file://{tmp_path}/")).damaged) == {}


def test_a_model_beside_it_that_is_gone_counts_like_damage(place: Storage) -> None:
    found = newest_whole(place, lambda at: "the critic beside it is gone" if at.name == "step-000003" else None)
    assert found.place == place / "step-000002"
    assert str(found) == "the checkpoint of step 3 is damaged: the critic beside it is gone"


def test_a_newer_format_is_not_taken_for_damage(place: Storage, tmp_path: Path) -> None:
    path = tmp_path / "step-000003" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    with pytest.raises(BadCheckpoint, match="has format 9"):
        newest_whole(place)
