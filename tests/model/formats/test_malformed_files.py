"""Files of every format, changed at random: a sentence or a model, nothing outside of the target, no hang, no giant."""

import json
import math
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.cluster.conversion.convert import convert_checkpoint
from lockstep.cluster.conversion.inspection import open_outline, plan_lines
from lockstep.cluster.conversion.memory import Watch
from lockstep.cluster.conversion.plan import Conversion
from lockstep.model.formats.files.extents import BadFile
from lockstep.model.formats.files.reading import reading
from tests.model.formats.tiny_checkpoints import (
    write_deepspeed,
    write_gguf,
    write_huggingface,
    write_lockstep,
    write_megatron,
    write_peft,
)

LONGEST_S, MOST_BYTES = 20, 400 << 20
"""Of one damaged checkpoint: seconds of the processor, and memory beyond what the process had."""

NAMES = [
    "../../planted",
    "/tmp/planted",
    "..",
    ".",
    "",
    "a\\b",
    "a\0b",
    "a\nb",
    "s3://a/b",
    "C:x",
    "x" * 300,
    "\ud800",
    "tokenizer.json",
]
NUMBERS = [-1, 0, 1, 2, 3, 7, 8, 255, 2**31, 2**53, 2**60, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, math.inf, math.nan]
VALUES = st.sampled_from(
    [
        *NAMES,
        *NUMBERS,
        None,
        True,
        False,
        [],
        {},
        [0],
        [None],
        {"a": 1},
        [[[]]],
        [2**60, 2**60],
        "pissa",
        "linear",
        "yarn",
    ]
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    base = write_huggingface(root / "huggingface")
    (root / "gguf").mkdir()
    write_gguf(root / "gguf" / "model.gguf")
    return {
        "huggingface": base,
        "lockstep": write_lockstep(root / "lockstep"),
        "megatron": write_megatron(root / "megatron"),
        "deepspeed": write_deepspeed(root / "deepspeed"),
        "peft": write_peft(root / "peft", base),
        "gguf": root / "gguf",
    }


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*at, key)
        yield from places(inner, (*at, key))


def damage_json(data: st.DataObject, found: Any) -> Any:
    """Replace, remove or rename up to three values."""
    for _ in range(data.draw(st.integers(1, 3))):
        known = [*places(found)]
        if not known:
            break
        *way, last = data.draw(st.sampled_from(known))
        inner = found
        for key in way:
            inner = inner[key]
        what = data.draw(st.sampled_from(["replace", "replace", "remove", "rename", "nest"]))
        if what == "replace":
            inner[last] = deepcopy(data.draw(VALUES))
        elif what == "nest":
            inner[last] = [inner[last]]
        else:
            value = inner.pop(last)
            if what == "rename" and isinstance(inner, dict):
                inner[data.draw(st.sampled_from(NAMES))] = value
    return found


def damage_json_file(data: st.DataObject, file: Path) -> None:
    file.write_text(json.dumps(damage_json(data, json.loads(file.read_text()))))


def damage_bytes(data: st.DataObject, content: bytes, end: int) -> bytes:
    """Change a few bytes before `end`, write a number over eight of them, cut some out, or cut the rest off."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        if not changed:
            break
        at = data.draw(st.integers(0, min(end, len(changed)) - 1))
        match data.draw(st.sampled_from(["byte", "byte", "number", "short", "remove", "cut"])):
            case "byte":
                changed[at] = data.draw(st.integers(0, 255))
            case "number":
                changed[at : at + 8] = (data.draw(st.sampled_from([0, 1, 2**31, 2**40, 2**60, 2**64 - 1]))).to_bytes(
                    8, "little"
                )
            case "short":
                changed[at : at + 4] = (data.draw(st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1]))).to_bytes(
                    4, "little"
                )
            case "remove":
                del changed[at : at + data.draw(st.integers(1, 9))]
            case "cut":
                del changed[at:]
    return bytes(changed)


def damage_safetensors(data: st.DataObject, file: Path) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        file.write_bytes(damage_bytes(data, content, 8 + length))
        return
    header = json.dumps(damage_json(data, json.loads(content[8 : 8 + length]))).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def damage_metadata(data: st.DataObject, file: Path) -> None:
    """Of torch.distributed.checkpoint: an attribute of a description, or bytes of the pickle."""
    content = file.read_bytes()
    if data.draw(st.booleans()):
        file.write_bytes(damage_bytes(data, content, len(content)))
        return
    metadata = pickle.loads(content)
    place = data.draw(st.sampled_from([*metadata.storage_data.values()]))
    index = data.draw(st.sampled_from([*metadata.storage_data]))
    tensor = data.draw(st.sampled_from([t for t in metadata.state_dict_metadata.values() if hasattr(t, "size")]))
    chunk = data.draw(st.sampled_from(tensor.chunks))
    attributes = [
        *((place, name) for name in ("relative_path", "offset", "length")),
        *((index, name) for name in ("fqn", "offset")),
        *((tensor, name) for name in ("size", "properties", "chunks")),
        *((chunk, name) for name in ("offsets", "sizes")),
        *((metadata, name) for name in ("state_dict_metadata", "storage_data")),
    ]
    of, name = data.draw(st.sampled_from(attributes))
    object.__setattr__(of, name, data.draw(VALUES))
    file.write_bytes(pickle.dumps(metadata))


def damage_first_bytes(data: st.DataObject, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(damage_bytes(data, content, min(len(content), 1500)))


Damage = Callable[[st.DataObject, Path], None]
DAMAGES: dict[str, tuple[str, str, Damage]] = {
    "manifest": ("lockstep", "step-000000/manifest.json", damage_json_file),
    "array": ("lockstep", "step-000000/arrays/model.norm.weight/zarr.json", damage_json_file),
    "index": ("huggingface", "model.safetensors.index.json", damage_json_file),
    "safetensors": ("huggingface", "model-00001-of-00002.safetensors", damage_safetensors),
    "config": ("huggingface", "config.json", damage_json_file),
    "adapter config": ("peft", "adapter_config.json", damage_json_file),
    "adapters": ("peft", "adapter_model.safetensors", damage_safetensors),
    "torch_dist": ("megatron", ".metadata", damage_metadata),
    "torch_dist common": ("megatron", "common.pt", damage_first_bytes),
    "torch_dist backend": ("megatron", "metadata.json", damage_json_file),
    "deepspeed": ("deepspeed", "global_step0_universal/mp_rank_00_model_states.pt", damage_first_bytes),
    "gguf": ("gguf", "model.gguf", damage_first_bytes),
}


def outcome(source: Path, destination: Path, dtype: str | None) -> str:
    """What a command says: the error, or that all is well."""
    try:
        conversion = Conversion(str(source), destination, "hf", dtype)
        opened = open_outline(conversion.source)
        assert [*plan_lines(conversion, opened)]
        convert_checkpoint(conversion, opened=opened)
    except ValueError as error:
        return str(error)
    return "converted"


def check(kind: str, data: st.DataObject, sources: dict[str, Path]) -> None:
    """Damage a copy of a checkpoint and convert it: it is converted, or what is wrong is one sentence."""
    form, name, damage = DAMAGES[kind]
    with tempfile.TemporaryDirectory() as room:
        source = shutil.copytree(sources[form], Path(room) / "a" / "b" / "source")
        damage(data, source / name)
        before = {*Path(room).rglob("*")}
        location = source / name if form == "gguf" else source
        watch, began = Watch(), time.process_time()
        dtype = data.draw(st.sampled_from([None, "bfloat16"]))
        assert len(outcome(location, source.parent / "out", dtype).splitlines()) == 1
        assert time.process_time() - began < LONGEST_S
        assert watch.peak() < MOST_BYTES
        new = {path.relative_to(source.parent).parts[0] for path in {*Path(room).rglob("*")} - before}
        assert new <= {"out", "out.partial"}
        assert not Path("/tmp/planted").exists()


def test_a_line_break_breaks_no_sentence(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["lockstep"], tmp_path / "source")
    manifest = source / DAMAGES["manifest"][1]
    values = json.loads(manifest.read_text())
    values["model"]["a\nb"] = 1
    manifest.write_text(json.dumps(values))
    said = outcome(source, tmp_path / "out", None)
    assert said.endswith('describes no model: "a\\nb": Extra inputs are not permitted')
    with pytest.raises(BadFile, match=r"^x is damaged, .* \(RuntimeError: one two\)$"), reading("x"):
        raise RuntimeError("one\n  two")


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@pytest.mark.parametrize("kind", DAMAGES)
@settings(max_examples=20, suppress_health_check=QUIET)
@given(data=st.data())
def test_a_damaged_file_is_one_sentence(kind: str, data: st.DataObject, sources: dict[str, Path]) -> None:
    check(kind, data, sources)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", DAMAGES)
@settings(max_examples=500, suppress_health_check=QUIET)
@given(data=st.data())
def test_thousands_of_damaged_files_are_one_sentence_each(
    kind: str, data: st.DataObject, sources: dict[str, Path]
) -> None:
    check(kind, data, sources)
