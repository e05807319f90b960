"""An sbatch script that starts Ray on an allocation and trains a recipe there.

What was asked for stands at the top of the script, with the whole recipe; what every job does is `slurm.sh`.
"""

import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.cluster.launch.ray_settings import RAY_SETTINGS
from lockstep.cluster.recipe.load import to_toml
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.render.nodes import Nodes, RenderError, check_fits, check_goes_on, job_name, seconds_to_end

BODY = Path(__file__).with_name("slurm.sh")
LONGEST_SCRATCH = 26
"""Bytes: names of sockets have 107 at most, and Ray adds the rest below its folder."""
SIGNAL_RESOLUTION_S = 60
"""By how much Slurm may send a signal earlier than it was asked to."""


@dataclass(frozen=True)
class SlurmJob:
    """What a job asks of Slurm, beside nodes."""

    hours: float
    """Time limit of each allocation."""
    partition: str = ""
    account: str = ""
    options: Sequence[str] = ()
    """More of sbatch's options, such as `--qos=high`."""
    container: str = ""
    """Image for Pyxis; without one the nodes' own Python runs."""
    mounts: Sequence[str] = ()
    """Of the container, as SOURCE:PATH."""
    python: str = ""
    """Interpreter on the nodes; this one, or the container's `python`, where none is given."""
    interface: str = ""
    """Network interface that nodes reach each other by; the one that routes between them where none is given."""
    scratch: str = "/tmp"
    """A folder on each node's own disk."""
    requeues: int = 3
    """How often the job goes on in a new allocation after it ran out of time or lost a node."""
    resume: bool = False
    """Go on from the run's last checkpoint in the first allocation, too."""


def sbatch_script(recipe: Recipe, nodes: Nodes, job: SlurmJob) -> str:
    """The script of a job, to be given to `sbatch`.

    Raises:
        RenderError: when the recipe cannot run so; one sentence.
    """
    check_fits(recipe, nodes)
    if job.requeues:
        check_goes_on(recipe, f"requeues={job.requeues}")
    _check(recipe, job)
    parts = ["#!/bin/bash", *_directives(recipe, nodes, job), "", *_settings(nodes, job), _recipe(recipe)]
    return "\n".join(parts) + BODY.read_text(encoding="utf-8")


def _check(recipe: Recipe, job: SlurmJob) -> None:
    needed = seconds_to_end(recipe) + SIGNAL_RESOLUTION_S
    if job.hours * 3600 <= needed:
        raise RenderError(
            f"hours={job.hours:g} leaves no time to train: a run is told to end {needed} s before its limit, of which "
            f"checkpoints.grace={recipe.checkpoints.grace:g}: ask for more, or lower it"
        )
    if not re.fullmatch(r"/[\w./-]+", job.scratch) or len(job.scratch) > LONGEST_SCRATCH:
        raise RenderError(
            f"scratch={job.scratch} is not an absolute path of at most {LONGEST_SCRATCH} letters, digits, dots and "
            "hyphens, which Ray needs for its sockets: give a short folder of the nodes' own disks, such as /tmp"
        )
    if job.mounts and not job.container:
        raise RenderError("mount has no effect without container: give an image, or leave mount out")
    for name, value in (("partition", job.partition), ("account", job.account), ("interface", job.interface)):
        if not re.fullmatch(r"[\w.,:@+-]*", value):
            raise RenderError(f"{name}={value!r} is no name that Slurm takes: give letters, digits and . , : @ + -")
    for option in job.options:
        if not re.fullmatch(r"--[a-z][^\s#'\"\\]*", option):
            raise RenderError(f"option={option!r} is no option of sbatch, as in --qos=high: give it without spaces")


def _directives(recipe: Recipe, nodes: Nodes, job: SlurmJob) -> list[str]:
    minutes = math.ceil(job.hours * 60)
    given = {
        "job-name": job_name(recipe, 60),
        "nodes": nodes.count,
        "ntasks-per-node": 1,
        "cpus-per-task": nodes.cpus,
        "gpus-per-node": nodes.gpus or None,
        "mem": f"{math.ceil(nodes.memory * 1024)}M" if nodes.memory else None,
        "time": f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00",
        "partition": job.partition or None,
        "account": job.account or None,
        "signal": f"B:TERM@{seconds_to_end(recipe)}",
        "open-mode": "append",
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += ["--requeue" if job.requeues else "--no-requeue", *job.options]
    return [f"#SBATCH {option}" for option in options]


def _settings(nodes: Nodes, job: SlurmJob) -> list[str]:
    """Lines that assign what the body reads."""
    scratch = "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
    resources = [f"--cpus-per-task={nodes.cpus}", *([f"--gpus-per-node={nodes.gpus}"] if nodes.gpus else [])]
    python = job.python or ("python" if job.container else sys.executable)
    mounted = shlex.quote(",".join(job.mounts) + "," if job.mounts else "") + '"$scratch:$scratch"'
    lines = [
        f"nodes={nodes.count} cpus={nodes.cpus} gpus={nodes.gpus} requeues={job.requeues}",
        f"scratch={job.scratch.rstrip('/')}/ls-{scratch}",
        f"python={shlex.quote(python)}",
        f"interface={shlex.quote(job.interface)}",
        f"resources=({shlex.join(resources)})",
        f"resume=({'--resume' if job.resume else ''})",
        f"container=(--container-image={shlex.quote(job.container)} --container-mounts={mounted})"
        if job.container
        else "container=()",
    ]
    return [*lines, f"export {' '.join(f'{name}={value}' for name, value in RAY_SETTINGS.items())}"]


def _recipe(recipe: Recipe) -> str:
    """A function that prints the recipe."""
    text, mark = to_toml(recipe), "END_OF_RECIPE"
    while mark in text:
        mark += "_"
    return f"print_recipe() {{ cat <<'{mark}'\n{text}{mark}\n}}\n"
