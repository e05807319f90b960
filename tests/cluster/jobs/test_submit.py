"""A recipe that is submitted runs on the head's cluster, with the code that was sent."""

import shutil
import socket
from pathlib import Path

import pytest

from lockstep.cluster.exit_codes import INFRASTRUCTURE, REFUSED
from lockstep.cluster.recipe.load import parse
from lockstep.cluster.recipe.paths import with_absolute_paths
from lockstep.distributed.checkpoint.manager import Checkpoint
from tests.cluster.cli_process import Command, overrides, summary, until, write_recipe
from tests.cluster.heads import Head, end_jobs, free_port, started

ROOT = Path(__file__).parents[3]


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the package, its links kept, in which the driver and the workers say something else."""
    copy = tmp_path / "copy"
    for name in ("cluster", "data", "distributed", "model", "rl", "src"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in (
        ("cluster/run/phases.py", '"measuring held-out', 'f"sent to {__file__}: measuring held-out'),
        ("rl/workers/model_worker.py", 'info("ready with', 'info("sent, and ready with'),
    ):
        text = (copy / file).read_text().replace(f"f{old}", old)
        assert old in text
        (copy / file).write_text(text.replace(old, new))
    return copy / "src"


def submit(log: Path, *arguments: str, address: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of `lockstep submit`."""
    command = Command(log, "submit", *arguments, "--address", address, **environment)
    try:
        return command.wait(280), command.output
    finally:
        command.kill()


@pytest.mark.exhaustive
def test_a_job_runs_on_the_head_with_the_code_that_was_sent(
    head: Head, changed: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    short = overrides("supervised.steps=2", "rl.steps=1", "layout.data=1")
    code, output = submit(tmp_path / "log", str(recipe), *short, address=head.address, PYTHONPATH=str(changed))
    assert code == 0, output
    assert "sft  2/2" in output
    assert "measuring held-out accuracy" in output
    assert f"sent to {head.folder}" in output
    assert "[policy 0 step 0] info: sent, and ready" in output
    assert "succeeded" in output
    assert summary(tmp_path / "tiny")["status"] == "finished"
    assert head.answers(), "the job took the head down"


@pytest.mark.exhaustive
def test_a_job_that_fails_fails_the_command(head: Head, tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    code, output = submit(tmp_path / "log", str(recipe), *overrides("layout.tensor=3"), address=head.address)
    assert code == REFUSED, output
    assert "layout.tensor=3 does not divide" in output
    assert "Traceback" not in output
    assert "failed" in output
    assert not (tmp_path / "tiny").exists()


@pytest.mark.exhaustive
def test_a_job_that_is_stopped_saves_first(head: Head, tmp_path: Path, tiny_folder: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    endless = overrides("rl.steps=100000", "layout.data=1")
    command = Command(
        tmp_path / "log", "submit", str(recipe), *endless, "--stop-on-interrupt", "--address", head.address
    )
    try:
        command.wait_for("\nrl   ")
        command.interrupt()
        assert command.wait(60) == 130
        until(lambda: summary(tmp_path / "tiny")["status"] == "interrupted", 60)
    finally:
        command.kill()
        end_jobs(head)
    saved = Checkpoint(tmp_path / "tiny")
    step = saved.manifest["step"]
    assert saved.states
    assert summary(tmp_path / "tiny")["ended"] == f"interrupted by SIGTERM after step {step}, which is saved"


def test_no_head_is_one_sentence(tmp_path: Path, tiny_folder: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    code, output = submit(tmp_path / "log", str(write_recipe(tmp_path, tiny_folder)), address=address)
    assert code == INFRASTRUCTURE
    assert output.startswith(f"error: no Ray head answers at {address} (")
    assert output.endswith("or correct the address, which is that of its dashboard, on port 8265\n")
    assert output.count("\n") == 1


@pytest.mark.exhaustive
def test_a_head_whose_agent_found_its_port_taken_is_one_sentence(tmp_path: Path, tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, started(taken.getsockname()[1]) as head:
        recipe = str(write_recipe(tmp_path, tiny_folder))
        code, output = submit(tmp_path / "log", recipe, address=head.address)
    assert code == INFRASTRUCTURE, output
    assert "Traceback" not in output
    assert "took no job (" in output
    assert output.endswith("start it with another --dashboard-agent-listen-port\n")


def test_paths_are_sent_absolute_and_names_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    sent = with_absolute_paths(parse({"model": {"source": "model"}, "name": "n", "task": {"generator": "chain_sum"}}))
    assert sent.model.source == str(tmp_path / "model")
    assert sent.run == str(tmp_path / "runs" / "n")
    assert sent.task.generator == "chain_sum"
