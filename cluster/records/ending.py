"""Says of a run that was killed that it was: its summary says running, and its process is gone."""

from dataclasses import asdict
from pathlib import Path

from lockstep.cluster.process_identity import ProcessIdentity
from lockstep.cluster.records.run_folder import SUMMARY, RunFolder
from lockstep.cluster.records.tables import Record


def this_process() -> Record:
    """What a summary says of the process that runs."""
    return asdict(ProcessIdentity.this_process())


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
    """Whether a process that a summary names has surely ended."""
    try:
        return isinstance(process, dict) and ProcessIdentity(**process).is_gone()
    except TypeError:
        return False
