"""Slurm's commands as jobs call them, on hosts of this machine: what a real srun does with tasks, signals and codes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SRUN = """#!{python}
import json, os, signal, subprocess, sys, time

arguments, options = sys.argv[1:], {{}}
while arguments[0].startswith("--"):
    name, _, value = arguments.pop(0).partition("=")
    options[name] = value
assert "--overlap" in options, "a step that does not share waits for those that run"
hosts = json.load(open({hosts!r}))
names = [options["--nodelist"]] if "--nodelist" in options else list(hosts)
assert len(names) == int(options["--nodes"]) == int(options["--ntasks"])
tasks = [
    subprocess.Popen([*hosts[name], *arguments], start_new_session=True, env=os.environ | {{"SLURM_NODEID": str(node)}})
    for node, name in enumerate(names)
]

def forward(number, frame=None):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, number)

signal.signal(signal.SIGTERM, forward)
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks) and "--kill-on-bad-exit" in options:
        forward(signal.SIGTERM)
    time.sleep(0.05)
codes = [task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks]
sys.exit(max(codes))
"""
SCONTROL = """#!/bin/sh
if [ "$1 $2" = "show hostnames" ]; then echo "$3" | tr , '\\n'; else echo "$@" >> {asked}; fi
"""
SQUEUE = """#!/bin/sh
case "$*" in *%T) cat {state} ;; *%e) echo 2030-01-01T00:00:00 ;; esac
"""


class Slurm:
    """Commands of Slurm in a folder, and the allocation that they know."""

    def __init__(self, folder: Path, hosts: Mapping[str, Sequence[str | Path]]) -> None:
        """
        Args:
            hosts: by name, the words before a command that run it there; the first has the batch script.
        """
        self.folder, self._hosts = folder, hosts
        (folder / "bin").mkdir(parents=True)
        names = folder / "hosts.json"
        names.write_text(json.dumps({name: [str(word) for word in words] for name, words in hosts.items()}))
        (folder / "state").write_text("RUNNING\n")
        texts = {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}
        for name, text in texts.items():
            command = folder / "bin" / name
            values = {"hosts": str(names), "asked": folder / "asked", "state": folder / "state"}
            command.write_text(text.format(python=sys.executable, **values))
            command.chmod(0o755)

    @property
    def requeued(self) -> list[str]:
        """What scontrol was asked for."""
        return (self.folder / "asked").read_text().splitlines() if (self.folder / "asked").exists() else []

    def cancel(self) -> None:
        """From now on the job is one that was cancelled."""
        (self.folder / "state").write_text("CANCELLED\n")

    def environment(self, job: int, restarts: int = 0) -> dict[str, str]:
        """What Slurm tells a batch script."""
        known = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": ",".join(self._hosts)}
        if restarts:
            known["SLURM_RESTART_COUNT"] = str(restarts)
        return known | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def batch(self, script: Path, job: int, restarts: int = 0) -> "subprocess.Popen[str]":
        """Runs a script on this machine, without a host of its own."""
        return subprocess.Popen(
            ["bash", script],
            env=os.environ | self.environment(job, restarts),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
