"""A run whose process is gone is written down as killed by who reads it next; nobody else is."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lockstep.cluster.records.ending import note_killed, this_process
from lockstep.cluster.records.report import write_report
from lockstep.cluster.records.run_folder import RunFolder


def left(path: Path, steps: int, process: object, **fields: Any) -> Path:
    """The folder of a run as it is in the middle of it."""
    run = RunFolder.create(path, "", "mine")
    run.update(process=process, **fields)
    for step in range(1, steps + 1):
        run.log("pretrain", step, {"loss": 1.0})
    return path


@pytest.fixture
def gone() -> dict[str, Any]:
    """A process that was killed outright."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = this_process() | {"pid": child.pid, "started": psutil.Process(child.pid).create_time()}
    child.kill()
    child.communicate()
    return process


@pytest.mark.parametrize(
    ("steps", "last"), [(0, "before its first step"), (1, "after pretrain 1"), (3, "after pretrain 3")]
)
def test_a_killed_run_is_written_down_by_its_next_reader(
    steps: int, last: str, gone: dict[str, Any], tmp_path: Path
) -> None:
    folder = left(tmp_path / "run", steps, gone)
    page = write_report(folder).read_text()
    summary = RunFolder.open(folder).summary()
    assert (summary["status"], summary["ended"]) == ("killed", f"killed {last}: process {gone['pid']} is gone")
    assert f"killed {last}" in page
    assert note_killed(folder) == summary["ended"]


def test_a_process_that_has_its_number_now_is_another(tmp_path: Path) -> None:
    mine = this_process()
    folder = left(tmp_path / "run", 1, mine | {"started": mine["started"] - 60})
    assert note_killed(folder) == f"killed after pretrain 1: process {os.getpid()} is gone"


@pytest.mark.parametrize(
    ("process", "fields"),
    [
        (this_process(), {}),
        (None, {}),
        (this_process() | {"host": "elsewhere", "pid": 1}, {}),
        (this_process() | {"started": 0.0}, {"status": "finished"}),
        (this_process() | {"started": 0.0}, {"status": "interrupted"}),
    ],
    ids=["alive", "of an older version", "on another host", "finished", "interrupted"],
)
def test_nobody_else_is_called_killed(process: object, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = left(tmp_path / "run", 1, process, **fields)
    note_killed(folder)
    assert RunFolder.open(folder).summary()["status"] == fields.get("status", "running")


def test_no_run_is_no_ending(tmp_path: Path) -> None:
    assert note_killed(tmp_path) is None
