"""However a run ends, it says why, leaves a record that can be read, and no process."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ray.util.state import list_actors

from lockstep.cluster.exit_codes import INFRASTRUCTURE
from lockstep.distributed.checkpoint.integrity import damage
from lockstep.distributed.checkpoint.manager import MANIFEST, Checkpoint, step_name
from tests.cluster.cli_process import Command, Train, metrics, overrides, summary, until, write_recipe
from tests.cluster.heads import Head

PRETRAINING = Path(__file__).parents[3] / "recipes" / "parity-tiny.toml"


@pytest.fixture
def learning(tmp_path: Path, tiny_folder: Path) -> Iterator[Command]:
    """A run that is in the middle of RL."""
    recipe = write_recipe(tmp_path, tiny_folder)
    endless = overrides("rl.steps=100000", "rollout.sequences=16", "recovery.restarts=0")
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
    assert learning.wait(30) == INFRASTRUCTURE
    assert "policy " in learning.output
    assert " died: " in learning.output
    assert "worker process has died" in learning.output
    assert gone(processes, 15)
    assert summary(tmp_path / "tiny")["status"] == "failed"
    assert " died: " in str(summary(tmp_path / "tiny")["error"])
    assert "failed" in (tmp_path / "tiny" / "report.html").read_text()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("ctrl-c", marks=pytest.mark.exhaustive),
        "sigterm",
        pytest.param("twice", marks=pytest.mark.exhaustive),
    ],
)
def test_an_interrupted_run_leaves_a_record_and_no_process(learning: Command, tmp_path: Path, kind: str) -> None:
    processes = learning.descendants()
    titles = [" ".join(p.cmdline()) for p in processes]
    for title in ("raylet", "gcs_server", "ray::ModelWorker", "lockstep.rl.verifiers.answer_pool"):
        assert any(title in t for t in titles), titles
    if kind == "ctrl-c":
        learning.interrupt()
    else:
        learning.process.send_signal(signal.SIGTERM)
    if kind == "twice":
        learning.interrupt()
    assert learning.wait(60) == 130
    assert gone(processes, 15), psutil.wait_procs(processes, timeout=0)[1]
    assert "Traceback" not in learning.output
    assert "*** SIG" not in learning.output
    assert summary(tmp_path / "tiny")["status"] == "interrupted"
    if kind != "twice":
        check_saved(tmp_path / "tiny", "SIGINT" if kind == "ctrl-c" else "SIGTERM")
    assert "interrupted" in (tmp_path / "tiny" / "report.html").read_text()
    report = Command(tmp_path / "report.log", "report", str(tmp_path / "tiny"))
    assert report.wait() == 0, report.output
    assert "RL steps" in report.output


def check_saved(run: Path, signal_name: str) -> None:
    """The last step that is in the metrics is in a checkpoint, with all that a run needs to go on."""
    saved = Checkpoint(run)
    step = saved.manifest["step"]
    assert saved.states
    assert saved.manifest["position"]["phase"] == "rl"
    assert saved.manifest["position"]["phase_step"] == metrics(run, "rl")[-1]["step"] == step - 16
    assert summary(run)["ended"] == f"interrupted by {signal_name} after step {step}, which is saved"
    assert damage(saved.place) is None


@pytest.mark.exhaustive
def test_a_pretraining_run_that_is_told_to_end_saves_first_and_goes_on(
    tmp_path: Path, train: Train, head: Head
) -> None:
    settings = (
        f"run={tmp_path}/run",
        "layout.data=2",
        "pretrain.steps=5000",
        f"checkpoints.at=file://{tmp_path}/store/",
    )
    command = Command(tmp_path / "log", "train", str(PRETRAINING), *overrides(*settings), RAY_ADDRESS=head.cluster)
    try:
        command.wait_for("pretrain    3/5000")
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(60) == 130
    finally:
        command.kill()
    assert "SIGTERM: the run ends its step and saves, within 120 s; a second signal ends it at once" in command.output
    saved = Checkpoint(f"file://{tmp_path}/store/")
    step = saved.manifest["step"]
    assert damage(saved.place) is None
    assert [m["step"] for m in metrics(tmp_path / "run", "pretrain")] == list(range(1, step + 1))
    assert summary(tmp_path / "run")["ended"] == f"interrupted by SIGTERM after step {step}, which is saved"
    code, output = train(tmp_path / "log", PRETRAINING, *settings, f"pretrain.steps={step + 2}", options=("--resume",))
    assert code == 0, output
    assert f"going on after step {step}" in output
    assert summary(tmp_path / "run")["ended"] is None
    assert [m["step"] for m in metrics(tmp_path / "run", "pretrain")] == list(range(1, step + 3))


@pytest.mark.exhaustive
def test_a_rollout_worker_is_replaced_when_the_checkpoint_that_a_run_went_on_from_is_gone(
    tmp_path: Path, tiny_folder: Path, train: Train, head: Head
) -> None:
    """It loads weights before it gets those of the policy, and not from a checkpoint that `keep_last` removes."""
    recipe, run = write_recipe(tmp_path, tiny_folder), tmp_path / "tiny"
    settings = ("layout.data=1", "supervised.steps=2", "checkpoints.every=2", "checkpoints.keep_last=1")
    code, output = train(tmp_path / "log", recipe, *settings)
    assert code == 0, output
    begun = run / "checkpoints" / step_name(4) / MANIFEST
    assert begun.exists()
    endless = overrides(*settings, "rl.steps=100000")
    command = Command(tmp_path / "log", "train", str(recipe), *endless, "--resume", RAY_ADDRESS=head.cluster)

    def runs_until(condition: Callable[[], bool]) -> None:
        until(lambda: condition() or not command.runs, 240)
        assert command.runs, command.output

    try:
        runs_until(lambda: not begun.exists())
        workers = list_actors(
            head.address, filters=[("class_name", "=", "RolloutWorker"), ("state", "=", "ALIVE")], detail=True
        )
        assert len(workers) == 1, command.output
        os.kill(workers[0].pid, signal.SIGKILL)
        runs_until(lambda: metrics(run, "rl")[-1]["replaced_workers"] == 1)
        last = metrics(run, "rl")[-1]["step"]
        runs_until(lambda: metrics(run, "rl")[-1]["step"] > last + 2)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(60) == 130
    finally:
        command.kill()
    assert "going on after step 4" in command.output
