"""However a run ends, it says why, leaves a record that can be read, and no process."""

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from lockstep.distributed.layout import Layout
from lockstep.model.training.config import OptimizerConfig, TrainerConfig
from lockstep.rl.remote import WorkerFailed, gather
from lockstep.rl.workers.worker_groups import ModelGroup
from tests.cluster.cli_process import Command, overrides, summary, write_recipe


@pytest.fixture
def learning(tmp_path: Path, tiny_folder: Path) -> Iterator[Command]:
    """A run that is in the middle of RL."""
    recipe = write_recipe(tmp_path, tiny_folder)
    endless = overrides("rl.steps=100000", "rollout.sequences=16")
    command = Command(tmp_path / "log", "train", str(recipe), *endless)
    try:
        command.wait_for("\nrl   ")
        yield command
    finally:
        command.kill()


def gone(processes: list[psutil.Process], timeout: float) -> bool:
    """Whether all processes end in time."""
    return not psutil.wait_procs(processes, timeout=timeout)[1]


def test_a_killed_worker_ends_the_run_and_is_named(learning: Command, tmp_path: Path) -> None:
    processes = learning.descendants()
    workers = learning.descendants("ray::ModelWorker")
    assert len(workers) == 2
    workers[1].kill()
    assert learning.wait(30) == 1
    assert "policy " in learning.output
    assert " died: " in learning.output
    assert "worker process has died" in learning.output
    assert gone(processes, 15)
    assert summary(tmp_path / "tiny")["status"] == "failed"
    assert " died: " in str(summary(tmp_path / "tiny")["error"])
    assert "failed" in (tmp_path / "tiny" / "report.html").read_text()


@pytest.mark.parametrize("kind", [pytest.param("ctrl-c", marks=pytest.mark.exhaustive), "sigterm, then ctrl-c"])
def test_an_interrupted_run_leaves_a_record_and_no_process(learning: Command, tmp_path: Path, kind: str) -> None:
    processes = learning.descendants()
    titles = [" ".join(p.cmdline()) for p in processes]
    for title in ("raylet", "gcs_server", "ray::ModelWorker", "lockstep.rl.verifiers.answer_pool"):
        assert any(title in t for t in titles), titles
    if kind == "ctrl-c":
        learning.interrupt()
    else:
        learning.process.send_signal(signal.SIGTERM)
        with pytest.raises(psutil.TimeoutExpired):
            learning.process.wait(0.5)
        learning.interrupt()
    assert learning.wait(30) == 130
    assert gone(processes, 15), psutil.wait_procs(processes, timeout=0)[1]
    assert "Traceback" not in learning.output
    assert "*** SIG" not in learning.output
    assert summary(tmp_path / "tiny")["status"] == "interrupted"
    assert "interrupted" in (tmp_path / "tiny" / "report.html").read_text()
    report = Command(tmp_path / "report.log", "report", str(tmp_path / "tiny"))
    assert report.wait() == 0, report.output
    assert "RL steps" in report.output


def test_an_error_inside_a_worker_is_shown_in_its_own_words(tmp_path: Path) -> None:
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=1)
    try:
        policy = ModelGroup(Layout(), threads=1, trainer=TrainerConfig(row_tokens=64))
        with pytest.raises(WorkerFailed, match=r"(?s)policy 0: .*BadCheckpoint.*nothing holds no checkpoint") as caught:
            gather(policy.start(tmp_path / "nothing", "float32", OptimizerConfig(), 1.0))
        assert "\x1b" not in str(caught.value)
    finally:
        ray.shutdown()
