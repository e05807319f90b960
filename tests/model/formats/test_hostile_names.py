"""What a stranger's checkpoint names outside of its folder is neither read nor written, in any format."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.cluster.conversion.convert import convert_checkpoint
from lockstep.cluster.conversion.plan import Conversion
from lockstep.distributed.checkpoint.file_names import BadName
from lockstep.distributed.checkpoint.manager import BadCheckpoint
from lockstep.model.formats.registry import BadSource, open_model
from tests.model.formats.tiny_checkpoints import (
    write_deepspeed,
    write_huggingface,
    write_lockstep,
    write_megatron,
    write_peft,
)

ELSEWHERE = [
    "../elsewhere/{}",
    "/{0}",
    "a/../../elsewhere/{}",
    "..\\elsewhere\\{}",
    "file:///{}",
    "C:{}",
    "",
    ".",
    None,
    3,
]


def convert(source: Path, to: str = "hf") -> None:
    """Convert a folder, beside which nothing but the target may come to be."""
    beside = {path.name for path in source.parent.iterdir()}
    try:
        convert_checkpoint(Conversion(str(source), source.parent / "out", to))
    finally:
        assert {path.name for path in source.parent.iterdir()} - beside <= {"out", "out.partial"}


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    words = json.loads(file.read_text())
    change(words)
    file.write_text(json.dumps(words))


@pytest.fixture(params=ELSEWHERE, ids=str)
def elsewhere(request: pytest.FixtureRequest) -> Any:
    return request.param


def named(elsewhere: Any, name: str) -> Any:
    return elsewhere.format(name) if isinstance(elsewhere, str) else elsewhere


def test_a_manifest_s_files(elsewhere: Any, tmp_path: Path) -> None:
    source = write_lockstep(tmp_path / "source")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "planted").write_text("mine")
    manifest = source / "step-000000" / "manifest.json"
    rewrite(manifest, lambda words: words["files"].append(named(elsewhere, "planted")))
    for to in ("hf", "lockstep", "megatron", "deepspeed"):
        with pytest.raises(BadCheckpoint, match=r"manifest\.json is damaged: it names"):
            convert(source, to)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "adapter_config.json", "modeling.py", "manifest.json", "common.pt"]
)
def test_a_manifest_s_files_stand_in_for_nothing_that_a_target_has(name: str, tmp_path: Path) -> None:
    source = write_lockstep(tmp_path / "source")
    (source / "step-000000" / name).touch()
    rewrite(source / "step-000000" / "manifest.json", lambda words: words["files"].append(name))
    with pytest.raises(ValueError, match=f"keeps '{name}' beside its weights|is damaged"):
        convert(source)
    assert not (tmp_path / "out.partial").exists()


def test_a_manifest_s_arrays_are_those_of_its_model(tmp_path: Path) -> None:
    source = write_lockstep(tmp_path / "source")
    manifest = source / "step-000000" / "manifest.json"
    rewrite(manifest, lambda words: words["tensors"].update(extra=words["tensors"]["model.norm.weight"]))
    with pytest.raises(BadSource, match="the manifest lists extra, which the model does not have: see"):
        convert(source)


def test_an_index_s_files(elsewhere: Any, tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "source")
    (tmp_path / "elsewhere").mkdir()
    first = sorted(source.glob("*.safetensors"))[0]
    shutil.copy(first, tmp_path / "elsewhere")

    def change(words: dict[str, Any]) -> None:
        places = words["weight_map"]
        words["weight_map"] = {n: named(elsewhere, f) if f == first.name else f for n, f in places.items()}

    rewrite(source / "model.safetensors.index.json", change)
    with pytest.raises(ValueError, match=r"index\.json (names .*: a name must be relative|does not say which file)"):
        convert(source)


def test_an_index_may_name_files_in_a_folder_below(tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "source")
    (source / "weights").mkdir()
    for file in source.glob("*.safetensors"):
        file.rename(source / "weights" / file.name)
    rewrite(
        source / "model.safetensors.index.json",
        lambda words: words.update(weight_map={n: f"weights/{f}" for n, f in words["weight_map"].items()}),
    )
    convert(source)


def test_text_files_and_shards_that_are_links_out_of_the_folder(tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "source")
    for name in ("tokenizer.json", min(path.name for path in source.glob("*.safetensors"))):
        (source / name).rename(tmp_path / name)
        (source / name).symlink_to(tmp_path / name)
        with pytest.raises(BadName, match=f"{name} is a link that leads out of"):
            convert(source)
        (source / name).unlink()
        (tmp_path / name).rename(source / name)
    convert(source)


def test_the_files_of_a_torch_dist_folder(elsewhere: Any, tmp_path: Path) -> None:
    source = write_megatron(tmp_path / "source")
    open_model(str(source))
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(source / "__0_0.distcp", tmp_path / "elsewhere")
    metadata = pickle.loads((source / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = named(elsewhere, "__0_0.distcp")
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.metadata (names .*: a name must be relative|is damaged.*relative_path)"):
        convert(source)


@pytest.mark.parametrize("elsewhere", [name for name in ELSEWHERE if isinstance(name, str)])
def test_the_folder_that_a_tracker_names(elsewhere: str, tmp_path: Path) -> None:
    trackers = {"latest_checkpointed_iteration.txt": write_megatron, "latest_universal": write_deepspeed}
    for tracker, write in trackers.items():
        source = write(tmp_path / tracker)
        (source / tracker).write_text(named(elsewhere, "step"))
        with pytest.raises(BadName, match=f"{tracker} names .*: a name must be relative"):
            open_model(str(source))


def test_parameters_of_a_universal_checkpoint(tmp_path: Path) -> None:
    source = write_deepspeed(tmp_path / "source")
    for file in source.glob("*/*mp_rank_00_model_states.pt"):
        states = torch.load(file)
        states["module"]["../../../elsewhere"] = torch.empty(0)
        torch.save(states, file)
    with pytest.raises(BadName, match=r"names '\.\./\.\./\.\./elsewhere/fp32\.pt'"):
        convert(source)


def test_adapters_of_adapters_are_refused_and_do_not_go_round(tmp_path: Path) -> None:
    base = write_huggingface(tmp_path / "base")
    first = write_peft(tmp_path / "first", base)
    assert open_model(str(first)).config.lora
    for second in (write_peft(tmp_path / "second", first), write_peft(tmp_path / "third", tmp_path / "third")):
        with pytest.raises(BadSource, match="which are adapters themselves: merge those into a model first"):
            open_model(str(second))
