"""`import lockstep` is cheap, and its functions train and submit as the commands do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lockstep
from lockstep.cluster.jobs.client import NoHead
from lockstep.cluster.launch.ray_session import NoCluster
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import resolve
from lockstep.cluster.run.dry_run import dry_run
from tests.cluster.heads import Head, free_port

CHEAP = """
import sys, lockstep
assert {"train", "submit", "load", "__version__"} <= set(dir(lockstep))
heavy = {"torch", "ray", "megatron", "deepspeed", "numpy", "pydantic", "typer", "rich"} & set(sys.modules)
assert not heavy, heavy
assert not [name for name in sys.modules if name.startswith("lockstep.")]
"""
TRAIN = """
import json, sys, lockstep
settings = json.loads(sys.argv[1])
run = lockstep.train("parity-tiny", settings, quiet=True)
losses = [line["loss"] for line in run.metrics() if line["phase"] == "pretrain"]
print(json.dumps([str(run.path), run.summary()["status"], losses]))
with lockstep.load(run.path, dtype="float32") as model:
    print(json.dumps([model.config.layers, model.generate("12", raw=True, max_new_tokens=4)]))
"""


def python(script: str, *arguments: str, **environment: str) -> list[str]:
    """What a program prints, line by line."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_import_loads_no_library() -> None:
    assert python(CHEAP) == []


def test_what_is_not_there_is_an_attribute_error() -> None:
    name = "tain"
    with pytest.raises(AttributeError, match="'lockstep' has no attribute 'tain'"):
        getattr(lockstep, name)


def test_what_is_wrong_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="there is no recipe nobody"):
        lockstep.train("nobody")
    with pytest.raises(RecipeError, match=r"rl\.group_sise is not a key"):
        lockstep.train("quickstart", {"rl.group_sise": 8})
    with pytest.raises(NoCluster):
        lockstep.train("parity-tiny", {"run": str(tmp_path / "run")}, address=f"127.0.0.1:{free_port()}", quiet=True)
    with pytest.raises(NoHead):
        lockstep.submit("parity-tiny", f"http://127.0.0.1:{free_port()}")
    assert not [path for path in tmp_path.rglob("*") if path.suffix != ".lock"]


def test_a_run_is_trained_and_its_model_loaded(tmp_path: Path, tiny_folder: Path, head: Head) -> None:
    head.check()
    vocabulary = json.loads((tiny_folder / "config.json").read_text())["vocab_size"]
    settings = {"run": f"{tmp_path}/run", "pretrain.steps": 1, "model.tokenizer": str(tiny_folder)}
    settings |= {"model.config.vocabulary": vocabulary, "checkpoints.every": 1}
    trained, loaded = python(TRAIN, json.dumps(settings), RAY_ADDRESS=head.cluster)
    path, status, losses = json.loads(trained)
    assert (path, status) == (str(tmp_path / "run"), "finished")
    assert len(losses) == 1
    assert 5 < losses[0] < 7
    layers, answer = json.loads(loaded)
    assert layers == 4
    assert isinstance(answer, str)
    again = dry_run(resolve("parity-tiny", settings | {"pretrain.steps": 2}), print, resume=True)
    assert str(again) == f"with processes 1 policy, into {path}, after {path}/checkpoints/step-000001"
