"""A job lives without its client: it is listed, followed again, stopped, resumed, and started again after a death."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lockstep import submit
from lockstep.cluster.exit_codes import INFRASTRUCTURE, INTERRUPTED, OUT_OF_TIME, REFUSED, SUCCESS
from lockstep.distributed.checkpoint.manager import Checkpoint
from tests.cluster.cli_process import Command, metrics, overrides, summary, until
from tests.cluster.heads import Head, end_jobs

SECRET = "a-secret-that-nobody-writes-down"
Lockstep = Callable[..., Command]


@pytest.fixture
def lockstep(head: Head, tmp_path: Path) -> Iterator[Lockstep]:
    """Starts a command that speaks to the shared head, in a folder that is not the repository."""
    head.check()
    started: list[Command] = []

    def start(*arguments: str, **environment: str) -> Command:
        log = tmp_path / f"{len(started)}.log"
        started.append(Command(log, *arguments, "--address", head.address.removeprefix("http://"), **environment))
        return started[-1]

    yield start
    for command in started:
        command.kill()
    end_jobs(head)


def settings(folder: Path, *more: str) -> list[str]:
    return overrides(f"run={folder}/run", "pretrain.evaluate_every=0", *more)


def done(command: Command, code: int = SUCCESS) -> str:
    """The output of a command that ends so."""
    assert command.wait(280) == code, command.output
    return command.output


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run, "pretrain")]


def job_id(output: str) -> str:
    found = re.search(r"^job (\S+)$", output, re.MULTILINE)
    assert found, output
    return found[1]


def written_down(secret: str, *folders: Path) -> list[Path]:
    """Files below folders that have a text in them."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if secret.encode() in path.read_bytes()]


def test_a_job_goes_on_without_its_client_is_listed_stopped_and_resumed(
    lockstep: Lockstep, head: Head, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sent = ["submit", "parity-tiny", "--name", "mine", "--env", "TOKEN_OF_TEST"]
    client = lockstep(*sent, *settings(tmp_path, "pretrain.steps=100000"), TOKEN_OF_TEST=SECRET)
    client.wait_for("2/100000")
    id = job_id(client.output)
    os.killpg(client.process.pid, signal.SIGKILL)
    table = done(lockstep("jobs")).splitlines()
    assert table[0].split()[:4] == ["job", "state", "step", "s/step"]
    mine = next(line for line in table if line.startswith(id))
    assert re.search(r"running +pretrain \d+/100000 +[\d.]+ +[\d,]+ +\d+% +loss \d\.\d+ +\d+", mine), mine
    ended = done(lockstep("stop", "mine"))
    assert "which is saved" in ended
    assert f"job {id}: stopped, exit code 130" in ended
    assert done(lockstep("logs", id)).count("pretrain      1/100000") == 1
    step = Checkpoint(run).manifest["step"]
    resumed = done(lockstep("resume", "mine", "--set", f"pretrain.steps={step + 2}", TOKEN_OF_TEST=SECRET))
    assert f"going on after step {step}" in resumed
    assert job_id(resumed) != id
    assert summary(run)["status"] == "finished"
    assert len(losses(run)) == step + 2
    assert not written_down(SECRET, head.folder, tmp_path)


@pytest.mark.exhaustive
def test_what_is_not_there_is_refused_with_the_node(lockstep: Lockstep, tmp_path: Path) -> None:
    gone = tmp_path / "gone.jsonl"
    recipe = ["--set", f"task.generator={gone}", "--set", f"run={tmp_path}/run"]
    output = done(lockstep("submit", "quickstart", *recipe, "--env", "SET_NOWHERE"), REFUSED)
    assert "error: env=SET_NOWHERE is set neither where the job was submitted nor on " in output
    output = done(lockstep("submit", "quickstart", *recipe), REFUSED)
    assert f"error: the node {os.uname().nodename} has no {gone}, which task.generator names: put it there" in output
    assert not (tmp_path / "run").exists()


def driver_of(run: Path) -> psutil.Process:
    process = summary(run)["process"]
    assert isinstance(process, dict)
    return psutil.Process(process["pid"])


@pytest.mark.exhaustive
def test_a_driver_that_was_killed_goes_on_from_its_checkpoint(lockstep: Lockstep, tmp_path: Path) -> None:
    common = ("pretrain.steps=40", "checkpoints.every=2", "checkpoints.asynchronous=false")
    undisturbed = lockstep("submit", "parity-tiny", *settings(tmp_path / "other", *common))
    done(undisturbed)
    client = lockstep("submit", "parity-tiny", "--retries", "2", *settings(tmp_path, *common))
    client.wait_for(" 5/40")
    driver_of(tmp_path / "run").kill()
    output = done(client)
    assert "attempt 1 ended: the driver was killed by SIGKILL" in output
    assert "attempt 2 of 3: resuming" in output
    found = re.search(r"going on after step (\d+),", output)
    assert found, output
    assert 4 <= int(found[1]) < 40
    assert losses(tmp_path / "run") == losses(tmp_path / "other" / "run")
    assert "attempt 2" in done(lockstep("jobs"))


@pytest.mark.exhaustive
def test_retries_have_a_bound_and_the_first_cause_is_told_first(lockstep: Lockstep, tmp_path: Path) -> None:
    client = lockstep("submit", "parity-tiny", "--retries", "1", *settings(tmp_path, "pretrain.steps=100000"))
    for attempt, number in enumerate((signal.SIGKILL, signal.SIGABRT), start=1):
        until(lambda seen=attempt: client.output.count(" 2/100000") == seen, 240)
        driver_of(tmp_path / "run").send_signal(number)
    output = done(client, INFRASTRUCTURE)
    words = "the first cause: the driver was killed by SIGKILL; then the driver was killed by SIGABRT"
    assert f"no retry is left of 1; {words}" in output
    assert "infrastructure, attempt 2" in done(lockstep("jobs"))


@pytest.mark.exhaustive
def test_a_job_whose_time_is_up_saves_and_submits_the_rest(lockstep: Lockstep, tmp_path: Path) -> None:
    limit = ["--max-hours", "0.03", "--resubmit", "1", "--name", "short"]
    endless = settings(tmp_path, "pretrain.steps=100000", "checkpoints.grace=20")
    output = done(lockstep("submit", "parity-tiny", *limit, *endless), OUT_OF_TIME)
    assert "out of time: the run ends its step and saves, within 20 s" in output
    step = Checkpoint(tmp_path / "run").manifest["step"]
    assert f"out of time after step {step}, which is saved" in output
    found = re.search(r"out of time: the rest is the job (\S+), and 0 more may follow", output)
    assert found, output
    rest = lockstep("logs", "-f", found[1])
    rest.wait_for(f"going on after step {step}")
    assert done(rest, OUT_OF_TIME).count("the rest is the job") == 0
    assert Checkpoint(tmp_path / "run").manifest["step"] > step


@pytest.mark.exhaustive
def test_ctrl_c_leaves_the_job_running_and_says_how_to_follow_it(lockstep: Lockstep, tmp_path: Path) -> None:
    client = lockstep("submit", "parity-tiny", *settings(tmp_path, "pretrain.steps=100000"))
    client.wait_for("2/100000")
    client.interrupt()
    id = job_id(done(client, INTERRUPTED))
    assert f"the job {id} goes on: follow it with `lockstep attach {id} --address http://" in client.output
    follower = lockstep("attach", id)
    follower.wait_for("6/100000")
    done(lockstep("stop", id))
    done(follower, INTERRUPTED)


@pytest.mark.exhaustive
def test_a_program_submits_a_job_and_waits_for_it(head: Head, tmp_path: Path) -> None:
    head.check()
    values = {"run": f"{tmp_path}/run", "pretrain.steps": 2}
    job = submit("parity-tiny", head.address, values, name="from Python", retries=1)
    assert job.id.startswith("from-Python-")
    assert job.exit_code is None
    assert job.wait(quiet=True) == job.exit_code == SUCCESS
    assert len(losses(tmp_path / "run")) == 2
    job = submit("parity-tiny", head.address, values | {"layout.tensor": 3})
    assert job.wait(quiet=True) == REFUSED
    assert summary(tmp_path / "run")["status"] == "finished"
