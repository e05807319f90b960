"""Conversion: no bit changes, memory is kept, a kill costs little, and what is wrong is said in one sentence."""

import json
import math
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from lockstep.cluster.checks.verify import verify_checkpoint
from lockstep.cluster.cli import app
from lockstep.cluster.conversion.convert import convert_checkpoint
from lockstep.cluster.conversion.inspection import ConfigurationAlone, inspect_checkpoint, open_outline, plan_lines
from lockstep.cluster.conversion.memory import in_words, size_of
from lockstep.cluster.conversion.plan import Conversion, TooMuchMemory, tasks_of
from lockstep.cluster.conversion.staging import BadTarget, Staging
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.storage import storage_of
from lockstep.distributed.checkpoint.tensors import Box, state_name, whole
from lockstep.model.config import ModelConfig
from lockstep.model.formats import registry
from lockstep.model.formats.files.extents import BadFile
from lockstep.model.formats.huggingface.writer import HuggingFaceTarget
from lockstep.model.formats.lockstep import LockstepTarget
from lockstep.model.formats.recast import BadValue, Recast
from lockstep.model.formats.registry import Format, ModelContents, open_model, recognise
from lockstep.model.formats.target import Part, Wanted, rows_of_part, split, write_whole
from lockstep.model.weights.initialization import RandomWeights
from lockstep.model.weights.names import logical_tensors
from tests.cluster.cli_process import Command, until

SMALL = ModelConfig(
    layers=2, width=12, heads=4, kv_heads=2, head_dim=4, intermediate=10, vocabulary=31, context=16, tied=False
)
LARGE = ModelConfig(
    layers=4, width=256, heads=4, kv_heads=2, head_dim=64, intermediate=1024, vocabulary=8001, context=64, tied=False
)
LEAST = 80 * 10**6
"""Memory that makes parts of 1 MiB."""


def small_folder(folder: Path) -> Path:
    """A Hugging Face folder of random weights in files of 2 KB."""
    source = Recast(RandomWeights(SMALL, seed=3), SMALL, None)
    target = HuggingFaceTarget(folder, SMALL, source, {"tokenizer.json": "{}"}, shard_bytes=2000)
    write_whole(target)
    return folder


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of 30 MB in fp32: many parts of 1 MiB."""
    folder = tmp_path_factory.mktemp("large") / "model"
    target = HuggingFaceTarget(folder, LARGE, Recast(RandomWeights(LARGE, seed=1), LARGE, None), {})
    write_whole(target)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """All files, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class WithState:
    """Weights of one dtype, with an optimizer's state drawn from the names."""

    updates = 17

    def __init__(self, model: ModelConfig, dtype: Any) -> None:
        self._weights, self._shapes, self._dtype = RandomWeights(model, seed=5), logical_tensors(model), dtype
        kinds = ("exp_avg", "exp_avg_sq") if dtype == np.float32 else ("master", "exp_avg", "exp_avg_sq")
        self.states = tuple(state_name(kind, name) for kind in kinds for name in self._shapes)

    def read(self, name: str, box: Box) -> NDArray[Any]:
        kind, _, weight = name.rpartition("/")
        exact = self._weights.read(weight, box)
        if kind in ("", "master"):
            return exact if kind else exact.astype(self._dtype)
        return exact * np.float32(0.1 if kind == "exp_avg" else 0.01)


def written(folder: Path, model: ModelConfig, source: Recast, part_bytes: int = 1 << 20) -> Checkpoint:
    """Our checkpoint of a source, in parts of a size."""
    target = LockstepTarget(folder, Wanted(model, source, {}, 10**9, part_bytes))
    write_whole(target)
    return Checkpoint(folder)


@pytest.mark.parametrize("limit", [100, 700, 1 << 20])
def test_parts_of_any_size_make_the_same_checkpoint(limit: int, tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "hf")
    opened = open_model(str(folder))
    source, model = opened.source, opened.config
    ours = written(tmp_path / "ours", model, Recast(source, model, None), limit)
    assert verify_checkpoint(str(tmp_path / "ours")).faults == ()
    assert verify_checkpoint(str(folder), str(tmp_path / "ours")).faults == ()
    target = HuggingFaceTarget(
        tmp_path / "back", model, Recast(ours, model, None), {"tokenizer.json": "{}"}, shard_bytes=2000, limit=limit
    )
    assert len(target.parts) > 100 or limit > 100
    write_whole(target)
    assert files_of(tmp_path / "back") == files_of(folder)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_tensors_that_files_join_or_turn_are_written_by_rows(family: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {
        "gpt2": dict(n_embd=24, n_layer=2, n_head=4, n_positions=32, vocab_size=31),
        "mixtral": dict(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=31,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=32,
        ),
    }
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **words[family])).save_pretrained(tmp_path / "theirs")
    opened = open_model(str(tmp_path / "theirs"))
    source, model = opened.source, opened.config
    for limit in (90, 1 << 20):
        target = HuggingFaceTarget(tmp_path / f"{limit}", model, Recast(source, model, None), {}, limit=limit)
        write_whole(target)
        before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "theirs", tmp_path / f"{limit}"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_shards_have_an_index_that_transformers_reads(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "hf")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * SMALL.parameters
    assert len(set(index["weight_map"].values())) > 3
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_torch_save_are_read_like_safetensors(sharded: bool, tmp_path: Path) -> None:
    folder, other = small_folder(tmp_path / "hf"), tmp_path / "bin"
    state = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    other.mkdir()
    shutil.copy(folder / "config.json", other)
    parts = [dict(list(state.items())[:9]), dict(list(state.items())[9:])] if sharded else [state]
    names = [f"pytorch_model-{i}.bin" for i in range(2)] if sharded else ["pytorch_model.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, other / name)
    if sharded:
        places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        (other / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    found = verify_checkpoint(str(folder), str(other))
    assert found.faults == ()
    assert found.tensors == len(state)
    (other / names[-1]).write_bytes((other / names[-1]).read_bytes()[:-4000])
    with pytest.raises(BadFile, match=r"pytorch_model.*bin cannot be read"):
        open_model(str(other))


class Foreign:
    """Not a tensor."""


def test_a_foreign_class_in_a_file_of_weights_is_refused(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "hf")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"w": Foreign()}, folder / "pytorch_model.bin")
    with pytest.raises(
        BadFile, match=r"pytorch_model\.bin cannot be read as weights alone, because it holds a .*Foreign: save"
    ):
        open_model(str(folder))


def test_fp32_weights_go_where_they_belong(tmp_path: Path) -> None:
    shapes = logical_tensors(SMALL)
    low = written(tmp_path / "low", SMALL, Recast(WithState(SMALL, bfloat16), SMALL, None))
    assert (low.updates, len(low.states)) == (17, 3 * len(shapes))
    high = written(tmp_path / "high", SMALL, Recast(low, SMALL, "float32"))
    assert (high.updates, len(high.states)) == (17, 2 * len(shapes))
    again = written(tmp_path / "again", SMALL, Recast(high, SMALL, "bfloat16"))
    assert set(again.states) == set(low.states)
    for name, shape in shapes.items():
        exact = RandomWeights(SMALL, seed=5).read(name, whole(shape))
        assert np.array_equal(high.read(name, whole(shape)), exact)
        assert np.array_equal(again.read(state_name("master", name), whole(shape)), exact)
        assert np.array_equal(again.read(name, whole(shape)), low.read(name, whole(shape)))
        for kind in ("exp_avg", "exp_avg_sq"):
            parts = [c.read(state_name(kind, name), whole(shape)) for c in (low, high, again)]
            assert np.array_equal(parts[0], parts[1]), name
            assert np.array_equal(parts[0], parts[2]), name


@pytest.mark.parametrize("dtype", [bfloat16, np.float32], ids=["bfloat16", "float32"])
def test_every_format_that_has_a_place_for_it_keeps_the_optimizers_state(dtype: Any, tmp_path: Path) -> None:
    kinds = 3 if dtype == np.float32 else 4
    written(tmp_path / "lockstep", SMALL, Recast(WithState(SMALL, dtype), SMALL, None))
    names = ["lockstep", "megatron", "deepspeed", "again"]
    for source, name in pairwise(names):
        to = "lockstep" if name == "again" else name
        assert convert_checkpoint(Conversion(str(tmp_path / source), tmp_path / name, to)).folder == tmp_path / name
        found = verify_checkpoint(str(tmp_path / "lockstep"), str(tmp_path / name))
        assert found.faults == found.notes == ()
        assert found.tensors == kinds * len(logical_tensors(SMALL))
        assert verify_checkpoint(str(tmp_path / name)).faults == ()
        assert open_model(str(tmp_path / name)).source.updates == 17


def test_a_plan_says_what_becomes_of_the_optimizer(tmp_path: Path) -> None:
    written(tmp_path / "ours", SMALL, Recast(WithState(SMALL, bfloat16), SMALL, None))

    def said(**options: Any) -> str:
        conversion = Conversion(str(tmp_path / "ours"), tmp_path / "new", **options)
        return "\n".join(plan_lines(conversion, open_outline(conversion.source)))

    assert "after 17 updates (master, exp_avg, exp_avg_sq) comes along" in said(to="lockstep")
    assert "(master, exp_avg, exp_avg_sq) is left out: Hugging Face has no place for it" in said(to="hf")
    assert "the weights are the optimizer's fp32 masters" in said(to="hf", dtype="float32")
    assert "no optimizer state comes along" in said(to="lockstep", weights_only=True)
    assert not (tmp_path / "new.partial").exists()
    convert_checkpoint(Conversion(str(tmp_path / "ours"), tmp_path / "new", "lockstep", weights_only=True))
    assert Checkpoint(tmp_path / "new").states == ()


def test_float16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "hf")
    done = convert_checkpoint(Conversion(str(folder), tmp_path / "half", "hf", dtype="float16"))
    before, after = (open_model(str(f)).source for f in (folder, done.folder))
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(after.read(name, ((0, 10), (0, 12))), before.read(name, ((0, 10), (0, 12))).astype("f2"))

    class Wide(RandomWeights):
        def read(self, name: str, box: Box) -> NDArray[Any]:
            return super().read(name, box) + np.float32(70000)

    with pytest.raises(BadValue, match=r"model\.norm\.weight has values that float16 cannot hold"):
        Recast(Wide(SMALL, seed=0), SMALL, "float16").read("model.norm.weight", ((0, 12),))


class Stop(Exception):
    """What ends a conversion in the middle here."""


def test_a_second_run_goes_on_where_the_first_stopped(large_folder: Path, tmp_path: Path) -> None:
    conversion = Conversion(str(large_folder), tmp_path / "ours", "lockstep", max_memory=LEAST)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        convert_checkpoint(conversion, stop)
    assert not (tmp_path / "ours").exists()
    arrays = tmp_path / "ours.partial" / "content" / "step-000000" / "arrays"
    before = {path: path.stat().st_mtime_ns for path in arrays.rglob("c.*")}
    assert before
    seen: list[int] = []
    done = convert_checkpoint(conversion, lambda done, total: seen.append(done))
    assert seen[0] > done.size // 2
    assert seen[-1] == done.size
    kept = (tmp_path / "ours" / path.relative_to(tmp_path / "ours.partial" / "content") for path in before)
    assert [path.stat().st_mtime_ns for path in kept] == list(before.values())
    assert verify_checkpoint(str(large_folder), str(tmp_path / "ours")).faults == ()
    assert verify_checkpoint(str(tmp_path / "ours")).faults == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


@pytest.mark.parametrize("to", ["hf", "megatron", "deepspeed"])
def test_every_format_goes_on_where_it_stopped(to: str, large_folder: Path, tmp_path: Path) -> None:
    conversion = Conversion(str(large_folder), tmp_path / "out", to, max_memory=LEAST)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        convert_checkpoint(conversion, stop)
    seen: list[int] = []
    done = convert_checkpoint(conversion, lambda done, total: seen.append(done))
    assert done.size // 2 < seen[0] < seen[-1] == done.size
    assert verify_checkpoint(str(large_folder), str(tmp_path / "out")).faults == ()


def test_a_key_value_store_is_written_to_and_read_from(
    large_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"file://{tmp_path}/bucket/mine/"
    conversion = Conversion(str(large_folder), storage_of(url), "lockstep", max_memory=LEAST)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        convert_checkpoint(conversion, stop)
    assert "holds no checkpoint" in refused("verify", url)
    arguments = "--max-memory", in_words(2 * LEAST).replace(" ", ""), "--workers", "2"
    assert "was begun with" in refused("convert", str(large_folder), url, "--dtype", "bfloat16", "--max-memory", "80MB")
    shutil.rmtree(tmp_path / "mine.partial")
    result = CliRunner().invoke(app, ["convert", str(large_folder), url, *arguments])
    assert result.exit_code == 0, result.output
    assert verify_checkpoint(url).faults == ()
    assert verify_checkpoint(str(large_folder), url).faults == ()
    assert inspect_checkpoint(url)["parameters"] == LARGE.parameters
    assert "exists: give a folder that does not" in refused("convert", str(large_folder), url)
    other = f"file://{tmp_path}/bucket/other/"
    assert "is written to folders only" in refused("convert", url, other, "--to", "hf")
    convert_checkpoint(Conversion(url, tmp_path / "back", "hf", max_memory=LEAST))
    assert verify_checkpoint(str(large_folder), str(tmp_path / "back")).faults == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "bucket"]
    assert "is no key-value store" in refused("inspect", "ftp://models/mine")


def test_another_source_or_option_is_not_mixed_in(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "hf")

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        convert_checkpoint(Conversion(str(folder), tmp_path / "out", "hf"), stop)
    with pytest.raises(BadTarget, match=r"out\.partial was begun with dtype=None, and now it is bfloat16: remove"):
        convert_checkpoint(Conversion(str(folder), tmp_path / "out", "hf", dtype="bfloat16"))
    with pytest.raises(BadTarget, match="was begun with to=hf, and now it is lockstep"):
        convert_checkpoint(Conversion(str(folder), tmp_path / "out", "lockstep"))
    os.utime(folder / "config.json", (1, 1))
    with pytest.raises(BadTarget, match="was begun with source files="):
        convert_checkpoint(Conversion(str(folder), tmp_path / "out", "hf"))


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path) -> None:
    first = Staging(tmp_path / "out", {"to": "hf"})
    with pytest.raises(BadTarget, match="is being written by another process"):
        Staging(tmp_path / "out", {"to": "hf"})
    first.close()
    Staging(tmp_path / "out", {"to": "hf"}).close()


def is_dead(process: psutil.Process) -> bool:
    """Whether it has ended, even if nobody has asked how."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_killed_workers_leave_work_that_counts(large_folder: Path, tmp_path: Path) -> None:
    arguments = (
        "convert",
        str(large_folder),
        str(tmp_path / "ours"),
        "--workers",
        "2",
        "--max-memory",
        "160MB",
    )
    command = Command(tmp_path / "log", *arguments)
    journal = tmp_path / "ours.partial" / "done.jsonl"
    until(lambda: journal.exists() and journal.read_text().count("\n") > 2, timeout=240)
    children = command.process.children(recursive=True)
    assert len(children) >= 2
    os.kill(command.process.pid, signal.SIGKILL)
    until(lambda: not psutil.wait_procs(children, timeout=1)[1] or all(map(is_dead, children)), timeout=60)
    assert not (tmp_path / "ours").exists()
    seen: list[int] = []
    alone = Conversion(str(large_folder), tmp_path / "ours", "lockstep", max_memory=LEAST)
    convert_checkpoint(alone, lambda done, total: seen.append(done))
    assert seen[0] > 0
    assert verify_checkpoint(str(large_folder), str(tmp_path / "ours")).faults == ()
    assert verify_checkpoint(str(tmp_path / "ours")).faults == ()


def test_tasks_of_a_ray_cluster_write_the_same(large_folder: Path, tmp_path: Path) -> None:
    arguments = ("--workers", "2", "--max-memory", "160MB", "--address", "local")
    command = Command(tmp_path / "log", "convert", str(large_folder), str(tmp_path / "ours"), *arguments)
    assert command.wait() == 0, command.output
    assert verify_checkpoint(str(large_folder), str(tmp_path / "ours")).faults == ()
    assert verify_checkpoint(str(tmp_path / "ours")).faults == ()


def test_memory_stays_within_its_bound(tmp_path: Path) -> None:
    model = LARGE.model_copy(update={"vocabulary": 60_001})
    zeros = HuggingFaceTarget(tmp_path / "model", model, Recast(ConfigurationAlone("float32"), model, None), {})
    zeros.create()
    zeros.finish({})
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 1.5 * LEAST
    for source, name, to in (("model", "ours", "lockstep"), ("ours", "back", "hf")):
        arguments = (
            "convert",
            str(tmp_path / source),
            str(tmp_path / name),
            "--to",
            to,
            "--max-memory",
            "80MB",
        )
        command = Command(tmp_path / "log", *arguments)
        assert command.wait() == 0, command.output
        assert "of 80MB allowed" in command.output
    assert files_of(tmp_path / "back") == files_of(tmp_path / "model")


def test_more_memory_than_allowed_ends_a_conversion(large_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TooMuchMemory, match=r"max_memory=10 MB is too little for workers=1: give 75\.5 MB or more"):
        convert_checkpoint(Conversion(str(large_folder), tmp_path / "ours", "lockstep", max_memory=10**7))
    ballast: list[mmap.mmap] = []

    def grow(done: int, total: int) -> None:
        ballast.append(mmap.mmap(-1, 32 << 20))  # new pages, where a heap might have some that others left
        ballast[-1].write(b"\1" * (32 << 20))

    with pytest.raises(TooMuchMemory, match=r"the conversion needed .* MB, more than max_memory=80 MB"):
        convert_checkpoint(Conversion(str(large_folder), tmp_path / "ours", "lockstep", max_memory=LEAST), grow)


def test_a_plan_of_a_configuration_alone_takes_seconds(tmp_path: Path) -> None:
    words = {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(words))
    began = time.process_time()
    for to in ("lockstep", "hf"):
        result = CliRunner().invoke(app, ["convert", str(tmp_path), str(tmp_path / "x"), "--to", to, "--dry-run"])
        assert result.exit_code == 0, result.output
        assert "70,553,706,496 parameters in 80 layers" in result.stdout
        assert "141 GB, " in result.stdout
        assert "723 tensors in bfloat16" in result.stdout
    assert time.process_time() - began < 5
    assert inspect_checkpoint(str(tmp_path))["parameters"] == 70_553_706_496
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def refused(*arguments: str) -> str:
    """The one sentence that a command ends with, in the last line."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


def rewrite(file: Path, **changes: Any) -> None:
    """Change words of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGE: dict[str, tuple[Any, str]] = {
    "missing shard": (lambda f: (f / "model-00002-of-00007.safetensors").unlink(), "lacks model-00002-of-00007"),
    "truncated shard": (
        lambda f: os.truncate(f / "model-00003-of-00007.safetensors", 900),
        "00003-of-00007.*is cut off",
    ),
    "empty shard": (lambda f: os.truncate(f / "model-00003-of-00007.safetensors", 0), "00003-of-00007.*is cut off"),
    "no header": (
        lambda f: (f / "model-00001-of-00007.safetensors").write_bytes(b"\x09" + bytes(7) + b"not JSON!"),
        "00001-of-00007.*no safetensors file",
    ),
    "wrong shape": (
        lambda f: rewrite(f / "config.json", intermediate_size=11),
        r"_proj.weight in .* has shape",
    ),
    "missing tensor": (lambda f: rewrite(f / "config.json", num_hidden_layers=3), r"lacks the tensor model\.layers\.2"),
    "architecture": (lambda f: rewrite(f / "config.json", model_type="phimoe"), "model_type='phimoe' is not supported"),
    "heads": (lambda f: rewrite(f / "config.json", num_key_value_heads=3), "heads=4 is no multiple of kv_heads=3"),
    "words": (
        lambda f: rewrite(f / "config.json", num_hidden_layers="two"),
        "config.json describes no model: num_hidden_layers is 'two'",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_source_is_one_sentence_and_nothing_is_written(damage: str, tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "hf")
    assert len(list(folder.glob("*.safetensors"))) == 7
    spoil, words = DAMAGE[damage]
    spoil(folder)
    before = files_of(folder)
    for to in ("lockstep", "hf"):
        assert re.search(words, refused("convert", str(folder), str(tmp_path / "out"), "--to", to))
    assert files_of(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("to", ["lockstep", "hf"])
def test_a_command_opens_its_source_once(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a format of folders of its own, which counts how often it is asked for and opened."""
    folder, asked, opened = small_folder(tmp_path / "counted"), list[Path](), list[Path]()

    def recognises(path: Path) -> bool:
        asked.append(path)
        return path.name == "counted"

    def read(path: Path) -> ModelContents:
        opened.append(path)
        return huggingface.read(path)

    huggingface = recognise(folder)
    counting = Format("counted", "Counted", recognises, read)
    monkeypatch.setattr(registry, "FORMATS", (counting, *registry.FORMATS))
    result = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), "--to", to])
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0] == f"{folder}: Counted, llama, {SMALL.parameters:,} parameters in 2 layers"
    assert (asked, opened) == ([folder], [folder])
    for count, command in enumerate((["inspect", str(folder)], ["verify", str(folder)]), start=2):
        assert CliRunner().invoke(app, command).exit_code == 0
        assert (len(asked), len(opened)) == (count, count)


def test_a_configuration_alone_is_not_converted(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "hf")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    said = refused("convert", str(folder), str(tmp_path / "out"))
    assert said == f"error: {folder} lacks model.safetensors, and has no other file of weights"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_bad_option_is_one_sentence(tmp_path: Path) -> None:
    folder, out = str(small_folder(tmp_path / "hf")), str(tmp_path / "out")
    assert "'5 apples' is not a size" in refused("convert", folder, out, "--shard-size", "5 apples")
    assert "error: --max-memory 80 MB is too little for --workers 3: give" in refused(
        "convert", folder, out, "--max-memory", "80MB", "--workers", "3"
    )
    assert "holds no checkpoint: give a folder" in refused("convert", str(tmp_path), out)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    ours = written(tmp_path / "ours", SMALL, Recast(RandomWeights(SMALL, seed=3), SMALL, None))
    (ours.place / "arrays" / "model.norm.weight").remove()
    for options in ([], ["--dtype", "bfloat16"]):
        said = refused("convert", str(ours.place), str(tmp_path / "out"), "--to", "hf", *options)
        assert "has no tensor model.norm.weight" in said
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)


def test_a_full_disk_is_one_sentence(large_folder: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own, with a disk of 8 MB."""
    if subprocess.run(["unshare", "-Urm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("user namespaces are not available here")
    line = f'mount -t tmpfs -o size=8m tmpfs {tmp_path} && "$@"'
    command = ["unshare", "-Urm", "sh", "-c", line, "sh", sys.executable, "-m", "lockstep"]
    arguments = ["convert", str(large_folder), str(tmp_path / "out"), "--to", "hf"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search(r"error: .*out\.partial needs .* MB, and its disk has .* left", done.stderr)


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 400))
def test_tasks_hold_every_part_once_and_in_order(sizes: list[int], limit: int) -> None:
    parts = [Part("w", i, i + 1, size) for i, size in enumerate(sizes)]
    tasks = tasks_of(parts, limit)
    assert [part for task in tasks for part in task] == parts
    assert all(sum(part.size for part in task) <= limit or len(task) == 1 for task in tasks)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=3), st.sampled_from([2, 4]), st.integers(1, 5000))
def test_parts_cover_the_rows_of_a_tensor_once(shape: list[int], item_bytes: int, limit: int) -> None:
    parts = list(split("w", shape, item_bytes, limit))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(shape[0]))
    assert sum(part.size for part in parts) == math.prod(shape) * item_bytes
    assert all(part.size <= limit or part.stop - part.start == 1 for part in parts)
    assert {part.start % rows_of_part(shape, item_bytes, limit) for part in parts} == {0}


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("64kb", 64000)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0GB", "5 XB", "1e3MB", "nanGB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size: give a number and one of KB, MB"):
        size_of(text)


@given(st.integers(0, 10**15))
def test_sizes_in_words_are_right_to_three_digits(size: int) -> None:
    number, unit = in_words(size).split()
    scale = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert float(number) * scale == pytest.approx(size, rel=6e-3)
