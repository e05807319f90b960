"""A run whose ranks die begins again from its newest checkpoint, ends with the same bits, and tells the first cause."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lockstep.cluster.exit_codes import INFRASTRUCTURE
from lockstep.cluster.run.attempts import HOUR_S, Restarts
from lockstep.cluster.run.failures import RunFailed
from lockstep.distributed.checkpoint.manager import Checkpoint, step_name
from lockstep.rl.remote import WorkerDied
from tests.cluster.cli_process import Command, Train, metrics, overrides, summary, until, write_recipe
from tests.cluster.heads import Head
from tests.cluster.run.test_resuming_rl import figures, same_checkpoints

PRETRAINING = Path(__file__).parents[3] / "recipes" / "parity-tiny.toml"
STEPS = 32
TEXT = (f"pretrain.steps={STEPS}", "layout.data=2", "checkpoints.every=4")


def test_restarts_are_bounded_within_an_hour_and_the_first_cause_is_told_first() -> None:
    now = [0.0]
    restarts = Restarts(2, lambda: now[0])
    assert restarts.count(WorkerDied("policy 0 died: first\nof many lines")) == "policy 0 died: first"
    now[0] = HOUR_S - 1
    restarts.count(WorkerDied("policy 1 died: second"))
    now[0] = HOUR_S + 1
    restarts.count(WorkerDied("policy 2 died: third"))
    with pytest.raises(
        RunFailed, match=r"^policy 1 died: second; .*recovery.restarts=2 .* then critic 0 died: fourth:"
    ):
        restarts.count(WorkerDied("critic 0 died: fourth\nat length"))
    with pytest.raises(WorkerDied, match="at once"):
        Restarts(0).count(WorkerDied("at once"))


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    """Runs that end with the test."""
    started: list[Command] = []
    yield started
    for command in started:
        command.kill()


def workers(head: Head, kind: str) -> list[psutil.Process]:
    """Processes of a class of workers, by when they began."""
    found = []
    for process in psutil.Process(head.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(f"ray::{kind}"):
                found.append(process)
    return sorted(found, key=psutil.Process.create_time)


@pytest.mark.exhaustive
def test_ranks_that_die_before_and_after_a_checkpoint_change_no_bit(
    tmp_path: Path, train: Train, head: Head, commands: list[Command]
) -> None:
    code, output = train(tmp_path / "log", PRETRAINING, f"run={tmp_path}/straight", *TEXT)
    assert code == 0, output
    run = tmp_path / "run"
    command = Command(
        tmp_path / "log", "train", str(PRETRAINING), *overrides(f"run={run}", *TEXT), RAY_ADDRESS=head.cluster
    )
    commands.append(command)
    command.wait_for("measured peak")
    workers(head, "ModelWorker")[-1].kill()
    command.wait_for("the run begins again from its beginning")
    command.wait_for_file(run / "checkpoints" / step_name(4) / "manifest.json")
    workers(head, "ModelWorker")[0].kill()
    assert command.wait() == 0, command.output
    assert command.output.count(": the run begins again ") == 2, command.output
    first, second = [each["step"] for each in summary(run)["restarts"]]  # type: ignore[attr-defined]
    assert first == 0
    assert 4 <= second < STEPS
    assert f"the run begins again after step {second}" in command.output
    same_checkpoints(Checkpoint(tmp_path / "straight"), Checkpoint(run))
    assert [m["step"] for m in metrics(run, "pretrain")] == list(range(1, STEPS + 1))
    one, other = ([figures(m) for m in metrics(r, "pretrain")] for r in (tmp_path / "straight", run))
    assert one == other


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_a_stopped_rank_of_a_model_is_named_and_the_run_begins_again(
    kind: str, tmp_path: Path, tiny_folder: Path, train: Train, head: Head, commands: list[Command]
) -> None:
    recipe = write_recipe(tmp_path, tiny_folder)
    settings = ("layout.data=1", "supervised.steps=4", "rl.steps=8", "rl.method=ppo", "checkpoints.every=3")
    code, output = train(tmp_path / "log", recipe, f"run={tmp_path}/straight", *settings)
    assert code == 0, output
    command = Command(
        tmp_path / "log",
        "train",
        str(recipe),
        *overrides(*settings, "recovery.stopped_after=5"),
        RAY_ADDRESS=head.cluster,
    )
    commands.append(command)
    run = tmp_path / "tiny"
    command.wait_for_file(run / "checkpoints" / step_name(6) / "manifest.json")
    policy, critic = workers(head, "ModelWorker")
    (policy if kind == "policy" else critic).send_signal(signal.SIGSTOP)
    command.wait_for(f"{kind} 0 counts as dead: its process")
    assert command.wait() == 0, command.output
    assert "stopped by a signal for 5 s" in str(summary(run)["restarts"])
    same_checkpoints(Checkpoint(tmp_path / "straight"), Checkpoint(run))
    one, other = ([figures(m) for m in metrics(r, "rl")] for r in (tmp_path / "straight", run))
    assert one == other


@pytest.mark.exhaustive
def test_a_rank_that_dies_again_and_again_ends_the_run_with_the_first_cause(
    tmp_path: Path, head: Head, commands: list[Command]
) -> None:
    settings = f"run={tmp_path}/run", *TEXT, "pretrain.steps=5000", "recovery.restarts=1"
    command = Command(tmp_path / "log", "train", str(PRETRAINING), *overrides(*settings), RAY_ADDRESS=head.cluster)
    commands.append(command)
    for sentence in ("pretrain    5/5000", "the run begins again after step "):
        command.wait_for(sentence)
        until(lambda: len(workers(head, "ModelWorker")) == 2, 60)
        os.kill(workers(head, "ModelWorker")[1].pid, signal.SIGKILL)
    assert command.wait(120) == INFRASTRUCTURE, command.output
    error = str(summary(tmp_path / "run")["error"])
    assert error.startswith("RunFailed: policy ")
    assert "recovery.restarts=1 allows within an hour, and then policy " in error
