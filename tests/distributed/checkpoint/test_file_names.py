"""Names that a stranger's file gives: inside of their folder, or refused, in folders and in key-value stores."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.distributed.checkpoint.file_names import BadName, checked_name, checked_names, path_inside
from lockstep.distributed.checkpoint.manager import BadCheckpoint, Checkpoint
from lockstep.distributed.checkpoint.reshard import chunks_of
from lockstep.distributed.checkpoint.saver import Saver
from lockstep.distributed.checkpoint.storage import Storage, storage_of

OUTSIDE: list[Any] = [
    *(
        "../planted",
        "a/../../planted",
        "a/..",
        "..",
        ".",
        "./a",
        "a/./b",
        "",
        "/",
        "/etc/passwd",
        "//host/x",
        "a//b",
        "a/",
    ),
    *("..\\planted", "a\\b", "C:\\x", "c:x", "a\0b", "a\nb", "\x7f", "s3://bucket/x", "file:///etc/passwd", "a/gs://b"),
    *("a" * 256, "ä" * 128, "a/" * 600 + "b", "\ud800", None, 7, 1.5, True, {"a": 1}, ["a"], b"a"),
]
INSIDE = [
    *("a", "a.b", "..a", "a..", "...", ".metadata", "__0_0.distcp", "a/b/c", "exp_avg/model.norm.weight", "ü", "a b"),
    *("epoch=1-step=2", "12:30", "a" * 255, "~", "$HOME", "%2e%2e", "-rf"),
]


@pytest.mark.parametrize("name", OUTSIDE, ids=[repr(name)[:30] for name in OUTSIDE])
def test_names_that_lead_out_or_are_none_are_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(BadName, match=r"index names .*: a name must be relative and stay inside of its folder"):
        checked_name(name, "index")
    with pytest.raises(BadName):
        path_inside(tmp_path, name, "index")
    for place in (storage_of(tmp_path), storage_of(f"file://{tmp_path}/")):
        for use in (place.has, place.read, place.__truediv__, lambda name, place=place: place.write(name, "x")):
            with pytest.raises(BadName):
                use(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", INSIDE)
def test_names_inside_stay_as_they_are(name: str, tmp_path: Path) -> None:
    assert checked_name(name, "index") == name
    assert path_inside(tmp_path, name, "index") == tmp_path / name


@given(st.lists(st.sampled_from(["a", "b", "..", ".", "", "/", "\\", "c:", "\0"]), max_size=6).map("/".join))
def test_what_is_let_through_never_leaves_the_folder(name: str) -> None:
    try:
        checked_name(name, "index")
    except BadName:
        return
    assert os.path.normpath(f"/x/y/{name}").startswith("/x/y/")


@pytest.mark.parametrize("names", [None, "a", {"a": 1}, 3, ["a", "a"], ["a", 3], ["a", None], [["a"]]])
def test_a_list_of_names_has_each_once(names: Any) -> None:
    assert checked_names(["a", "b/c"], "index") == ["a", "b/c"]
    with pytest.raises(BadName):
        checked_names(names, "index")


def test_links_that_lead_out_are_refused_and_those_of_the_hubs_cache_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    hub = tmp_path / "models--a--b"
    folder = hub / "snapshots" / "0123"
    for path in (folder, hub / "blobs"):
        path.mkdir(parents=True)
    (hub / "blobs" / "ff").write_text("weights")
    for link, to in {"blob": "../../blobs/ff", "inside": "blob", "out": "../../../secret", "far": "/etc/passwd",
                     "circle": "circle", "folder": "../..", "gone": "../../../nothing"}.items():  # fmt: skip
        (folder / link).symlink_to(to)
    for link in ("blob", "inside"):
        assert path_inside(folder, link, "index").read_text() == "weights"
    for link in ("out", "far", "circle", "folder/secret", "folder", "gone"):
        with pytest.raises(BadName, match="is a link that leads"):
            path_inside(folder, link, "index")
    (hub / "snapshots" / "newest").symlink_to("0123")
    assert path_inside(hub / "snapshots" / "newest", "blob", "index").read_text() == "weights"


def saved(place: Storage) -> Storage:
    saver = Saver(place)
    found = saver.save(3, chunks_of(torch.arange(6.0).view(2, 3), "w"), {}, {"note.txt": "ä"})
    saver.close()
    return found


@pytest.fixture(params=["folder", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return storage_of(tmp_path / "mine" if request.param == "folder" else f"file://{tmp_path}/mine/")


ENTRY = {"shape": [2], "dtype": "float32", "chunk": [2], "digests": [""]}
DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "file outside": ({"files": ["../../planted"]}, r"it names '\.\./\.\./planted'"),
    "absolute file": ({"files": ["/etc/passwd"]}, "it names '/etc/passwd'"),
    "file twice": ({"files": ["note.txt", "note.txt"]}, r"it names 'note\.txt' 2 times"),
    "files as text": ({"files": "note.txt"}, "it has str where a list of file names was needed"),
    "no files": ({"files": None}, "it has NoneType where a list"),
    "array outside": ({"tensors": {"exp_avg/../../../w": ENTRY}}, "it names 'exp_avg/"),
    "array of no shape": (
        {"tensors": {"w": {"dtype": "float32"}}},
        "does not say shape, dtype and chunks of the array w",
    ),
    "chunks of 0": ({"tensors": {"w": ENTRY | {"chunk": [0]}}}, "does not say shape"),
    "negative shape": ({"tensors": {"w": ENTRY | {"shape": [-2]}}}, "does not say shape"),
    "no tensors": ({"tensors": []}, "it lists no tensors"),
    "updates": ({"updates": "many"}, "updates is 'many'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_manifest_that_names_what_is_elsewhere_is_refused(damage: str, place: Storage) -> None:
    checkpoint = saved(place)
    assert Checkpoint(place).files == {"note.txt": "ä"}
    changes, said = DAMAGES[damage]
    checkpoint.write("manifest.json", json.dumps(json.loads(checkpoint.read("manifest.json")) | changes))
    with pytest.raises(BadCheckpoint, match=rf"manifest\.json is damaged: .*{said}"):
        Checkpoint(place)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "3", '{"format": 2', '{"format": 2}', "1" * 5000])
def test_a_manifest_of_another_kind_is_one_sentence(text: str, place: Storage) -> None:
    saved(place).write("manifest.json", text)
    with pytest.raises(BadCheckpoint, match=r"manifest\.json is damaged: ") as raised:
        Checkpoint(place)
    assert "\n" not in str(raised.value)


def test_files_and_arrays_that_are_links_out_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    saved(storage_of(tmp_path / "mine"))
    folder = tmp_path / "mine" / "step-000003"
    (tmp_path / "secret").write_text("mine")
    (folder / "note.txt").unlink()
    (folder / "note.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(BadName, match=r"note\.txt is a link that leads out of"):
        _ = Checkpoint(folder).files
    (folder / "arrays" / "w").rename(tmp_path / "w")
    (folder / "arrays" / "w").symlink_to(tmp_path / "w")
    with pytest.raises(BadName, match=r"is a link that leads out of"):
        Checkpoint(folder).read("w", ((0, 2), (0, 3)))
