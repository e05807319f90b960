"""`lockstep verify` finds every damage, names it, and says whether two checkpoints hold the same; `inspect` lists."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.model.config import ModelConfig
from lockstep.model.formats.huggingface import writer
from lockstep.model.formats.lockstep import LockstepTarget
from lockstep.model.formats.recast import Recast
from lockstep.model.formats.registry import open_model
from lockstep.model.formats.target import Wanted, write_whole
from lockstep.model.weights.initialization import RandomWeights
from lockstep.model.weights.names import logical_tensors
from tests.cluster.cli_process import lockstep

MODEL = ModelConfig(
    layers=2, width=12, heads=4, kv_heads=2, head_dim=4, intermediate=10, vocabulary=31, context=16, tied=False
)
NAME = "model.layers.1.mlp.down_proj.weight"


def fault(*arguments: str) -> str:
    """The one sentence with which a checkpoint is found to be bad."""
    result = lockstep("verify", *arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A Hugging Face folder of random weights."""
    writer.write(tmp_path / "theirs", MODEL, RandomWeights(MODEL, seed=3), {})
    return tmp_path / "theirs"


@pytest.fixture
def ours(theirs: Path, tmp_path: Path) -> Path:
    """The same as our checkpoint, in chunks of two rows."""
    opened = open_model(str(theirs))
    target = LockstepTarget(
        tmp_path / "ours", Wanted(opened.config, Recast(opened.source, opened.config, None), {}, 10**9, 100)
    )
    write_whole(target)
    return Path(str(Checkpoint(tmp_path / "ours").place))


def flip(file: Path, place: int) -> None:
    """Change one bit."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def chunks(checkpoint: Path) -> list[Path]:
    """Files of one tensor."""
    return sorted((checkpoint / "arrays" / NAME).glob("c.*"))


def test_what_is_whole_and_the_same_is_said_to_be(ours: Path, theirs: Path) -> None:
    count = len(logical_tensors(MODEL))
    for checkpoint in (ours, ours.parent, theirs):
        result = lockstep("verify", str(checkpoint))
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{checkpoint} is whole: {count} tensors\n"
    result = lockstep("verify", str(ours), "--against", str(theirs))
    assert result.stdout == f"{ours} and {theirs} hold the same numbers: {count} tensors\n"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda folder: flip(chunks(folder)[2], 20),
    "truncated": lambda folder: chunks(folder)[2].write_bytes(chunks(folder)[2].read_bytes()[:-9]),
    "empty": lambda folder: chunks(folder)[2].write_bytes(b""),
    "missing": lambda folder: chunks(folder)[2].unlink(),
    "missing tensor": lambda folder: shutil.rmtree(folder / "arrays" / NAME),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_chunk_is_named(damage: str, ours: Path) -> None:
    assert len(chunks(ours)) == 6
    DAMAGE[damage](ours)
    assert re.match(re.escape(NAME), fault(str(ours)))


def test_a_whole_chunk_of_other_numbers_is_named(ours: Path) -> None:
    shutil.copy(chunks(ours)[0], chunks(ours)[2])
    assert fault(str(ours)).startswith(f"{NAME} [4:6, 0:10] has other bytes than the manifest's digest says")


def change(manifest: Path, **words: object) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | words))


def test_a_manifest_that_does_not_fit_is_named(ours: Path) -> None:
    manifest = ours / "manifest.json"
    said = json.loads(manifest.read_text())
    tensors = said["tensors"]
    change(manifest, tensors=tensors | {NAME: tensors[NAME] | {"shape": [12, 11]}})
    assert fault(str(ours)).startswith(f"{NAME} has shape (12, 11), and the model's is (12, 10)")
    change(manifest, tensors=tensors | {NAME: tensors[NAME] | {"digests": tensors[NAME]["digests"][1:]}})
    assert "has 5 digests in the manifest, and its 6 chunks" in fault(str(ours))
    change(manifest, tensors={name: words for name, words in tensors.items() if name != NAME})
    assert fault(str(ours)).startswith(f"the manifest does not list {NAME}")
    change(manifest, tensors=tensors | {"model.layers.7.w": tensors[NAME]})
    assert fault(str(ours)).startswith("the manifest lists model.layers.7.w, which the model does not have")
    change(manifest, tensors=tensors, format=99)
    assert "has format 99, and this program reads" in fault(str(ours))


def test_a_damaged_folder_is_named(theirs: Path) -> None:
    file = theirs / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    assert "model.safetensors is cut off" in fault(str(theirs))
    file.unlink()
    assert "lacks model.safetensors" in fault(str(theirs))


def test_the_first_difference_is_named_with_both_values(ours: Path, theirs: Path) -> None:
    source = open_model(str(theirs)).source
    value = source.read(NAME, ((0, 12), (0, 10)))[7, 3]
    file = theirs / "model.safetensors"
    content = file.read_bytes()
    assert content.count(value.tobytes()) == 1
    other = np.float32(value + 1)
    file.write_bytes(content.replace(value.tobytes(), other.tobytes()))
    assert fault(str(ours), "--against", str(theirs)) == f"{NAME}[7, 3] is {value} in one and {other} in the other\n"


def test_dtypes_may_differ_and_values_are_compared(ours: Path, theirs: Path, tmp_path: Path) -> None:
    assert lockstep("convert", str(theirs), str(tmp_path / "low"), "--dtype", "bfloat16").exit_code == 0
    assert lockstep("convert", str(tmp_path / "low"), str(tmp_path / "high"), "--dtype", "float32").exit_code == 0
    result = lockstep("verify", str(tmp_path / "low"), "--against", str(tmp_path / "high"))
    assert result.exit_code == 0, result.output
    assert "dtypes differ (bfloat16 and float32): values were compared" in result.stderr
    assert lockstep("verify", str(ours), "--against", str(tmp_path / "low")).exit_code == 1


def test_other_models_differ_in_names_or_shapes(ours: Path, tmp_path: Path) -> None:
    wide = MODEL.model_copy(update={"intermediate": 11, "layers": 1})
    writer.write(tmp_path / "wide", wide, RandomWeights(wide, seed=3), {})
    result = lockstep("verify", str(ours), "--against", str(tmp_path / "wide"))
    assert result.exit_code == 1
    assert "model.layers.0.mlp.down_proj.weight has shape (12, 10) in one and (12, 11) in the other" in result.stderr
    assert "model.layers.1.mlp.down_proj.weight is in one checkpoint alone" in result.stderr


def test_what_is_no_checkpoint_is_an_error_of_the_user(tmp_path: Path) -> None:
    for command in ("verify", "inspect"):
        result = lockstep(command, str(tmp_path))
        assert result.exit_code == 2
        assert "holds no checkpoint" in result.stderr


def test_inspect_lists_tensors_for_people_and_programs(ours: Path, theirs: Path) -> None:
    for checkpoint, title in ((ours, "Lockstep"), (theirs, "Hugging Face")):
        found = json.loads(lockstep("inspect", str(checkpoint), "--json").stdout)
        assert (found["format"], found["parameters"]) == (title, MODEL.parameters)
        shapes = {tensor["name"]: tuple(tensor["shape"]) for tensor in found["tensors"]}
        assert shapes == logical_tensors(MODEL)
        assert {tensor["dtype"] for tensor in found["tensors"]} == {"float32"}
        assert sum(tensor["bytes"] for tensor in found["tensors"]) == 4 * MODEL.parameters
        table = lockstep("inspect", str(checkpoint)).stdout
        assert all(name in table for name in shapes)
    found = json.loads(lockstep("inspect", str(ours), "--json").stdout)
    assert (found["step"], found["layout"]["tensor"]) == (0, 1)
