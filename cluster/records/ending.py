"""Says of a run that was killed that it was: its summary says running, and its process is gone."""

import os
import socket
from pathlib import Path

import psutil

from lockstep.cluster.records.run_folder import SUMMARY, RunFolder
from lockstep.cluster.records.tables import Record

CLOCK_S = 1.0
"""By how much two readings of one process's start may differ."""


def this_process() -> Record:
    """What a summary says of the process that runs: with its start, since a process id may come again."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": psutil.Process(pid).create_time()}


def note_killed(path: Path) -> str | None:
    """Write down that the run of a folder was killed, if it was; returns how it ended, if it was not finished.

    A run of another host is left alone: nobody can see its process from here.
    """
    if not (path / SUMMARY).is_file():
        return None
    run = RunFolder.open(path)
    summary = run.summary()
    if summary["status"] == "running" and _is_gone(summary.get("process")):
        lines = run.metrics()
        last = f"after {lines[-1]['phase']} {lines[-1]['step']}" if lines else "before its first step"
        run.update(status="killed", ended=f"killed {last}: process {summary['process']['pid']} is gone")
    ended: str | None = run.summary().get("ended")
    return ended


def _is_gone(process: object) -> bool:
    """Whether a process has surely ended."""
    if not isinstance(process, dict) or process.get("host") != socket.gethostname():
        return False
    try:
        found = psutil.Process(process["pid"])
        return found.status() == psutil.STATUS_ZOMBIE or abs(found.create_time() - process["started"]) > CLOCK_S
    except psutil.NoSuchProcess:
        return True
