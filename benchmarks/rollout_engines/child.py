"""The process of an engine: reads a job, does its work and prints what it took as one line of JSON.

Loads the standard library alone, so that every environment can have it.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rollout_engines.work import Completion, Job

Generate = Callable[[Sequence[Completion]], list[Sequence[int]]]
"""Draws completions that run together; returns the new tokens of each, in the order of the requests."""


def read_job() -> Job:
    """The job whose file the command line names."""
    job: Job = json.loads(Path(sys.argv[1]).read_text())
    return job


def measured(job: Job, generate: Generate, packages: Sequence[str]) -> dict[str, Any]:
    """Do the work of a job.

    Returns:
        for each kind of work the new tokens a second of the fastest time and the tokens of prompts and completions;
        the versions of the packages.
    """
    generate(job["warm_up"])
    return {
        "speeds": {kind: max(speed(generate, asked) for asked in times) for kind, times in job["work"].items()},
        "tokens": {
            kind: [[sum(len(c["prompt"]) for c in asked), sum(c["new"] for c in asked)] for asked in times]
            for kind, times in job["work"].items()
        },
        "versions": {name: metadata.version(name) for name in packages},
    }


def speed(generate: Generate, asked: Sequence[Completion]) -> float:
    """New tokens a second, prompts included in the time.

    Raises:
        SystemExit: where a completion is longer or shorter than was asked for.
    """
    start = time.perf_counter()
    completions = generate(asked)
    seconds = time.perf_counter() - start
    drawn, wanted = list(map(len, completions)), [c["new"] for c in asked]
    if drawn != wanted:
        raise SystemExit(f"the engine drew {drawn} tokens where {wanted} were asked for: it did other work")
    return sum(drawn) / seconds


def show(report: dict[str, Any]) -> None:
    """Print a report as the line that the parent process reads, behind whatever libraries have printed."""
    print(f"\n{json.dumps(report)}", flush=True)
