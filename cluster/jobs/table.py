"""The table of jobs: what each is called, where it stands and how fast it is."""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import ray.job_submission as ray_jobs

from lockstep.cluster.exit_codes import INFRASTRUCTURE, OUT_OF_TIME
from lockstep.cluster.jobs.client import Jobs
from lockstep.cluster.jobs.following import exit_code
from lockstep.cluster.jobs.status import JobStatus, file_name
from lockstep.cluster.records.progress import duration

COLUMNS = ("job", "state", "step", "s/step", "tokens/s/GPU", "MFU", "reward or loss", "since")
ASKED_AT_ONCE = 8
"""Jobs whose status is asked for at the same time."""


def table(jobs: Jobs) -> list[str]:
    """Lines of a table of all jobs of a head, the newest first.

    Raises:
        NoHead: when the head does not answer.
    """
    found = jobs.all()
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        states = list(pool.map(lambda job: _status(jobs, job), found))
    return _aligned([COLUMNS, *(row(job, status, time.time()) for job, status in zip(found, states, strict=True))])


def row(job: ray_jobs.JobDetails, status: JobStatus, now: float) -> tuple[str, ...]:
    """The cells of one job; times in seconds since 1970."""
    since = (job.end_time if job.status.is_terminal() else job.start_time) or now * 1000
    learned = _cell("reward {:.2f}", status.reward) if status.reward is not None else _cell("loss {:.3f}", status.loss)
    return (
        str(job.submission_id),
        _state(job, status),
        f"{status.phase} {status.step}/{status.steps}" if status.phase else "–",
        _cell("{:.2f}", status.step_seconds),
        _cell("{:,.0f}", status.tokens_per_second),
        _cell("{:.0%}", status.mfu),
        learned,
        duration(now - since / 1000),
    )


def _status(jobs: Jobs, job: ray_jobs.JobDetails) -> JobStatus:
    return JobStatus.of_json(jobs.status_file(job, file_name(str(job.submission_id))))


def _state(job: ray_jobs.JobDetails, status: JobStatus) -> str:
    words = {OUT_OF_TIME: "out of time", INFRASTRUCTURE: "infrastructure"}
    said = words.get(exit_code(job) or 0, job.status.value.lower())
    return f"{said}, attempt {status.attempt}" if status.attempt > 1 else said


def _cell(form: str, value: float | None) -> str:
    return "–" if value is None else form.format(value)


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
