"""Follows a job's log to its end, whoever submitted it; a connection that closes is made again."""

import asyncio
import time
from collections.abc import Callable

import aiohttp
import ray.job_submission as ray_jobs

from lockstep.cluster.exit_codes import FAILED, INFRASTRUCTURE, INTERRUPTED, OUT_OF_TIME, REFUSED, SUCCESS
from lockstep.cluster.jobs.client import Jobs, NoHead

PATIENCE_S = 120.0
"""How long a head that has answered may not answer before following ends."""
PAUSE_S = 1.0
"""Between two attempts to connect."""


def follow(jobs: Jobs, job: str, write: Callable[[str], object], *, tail: int | None = None) -> ray_jobs.JobDetails:
    """Pass a job's log to `write` until the job has ended; returns what the head says of it then.

    Args:
        tail: begin with so many lines of what is there; with all of it where that is None.

    Raises:
        NoHead: when the head has not answered for `PATIENCE_S` seconds; the job may still run.
    """
    log = _Log(jobs, job, write)
    if tail is not None:
        log.skip_all_but(tail)
    answered = time.monotonic()
    while True:
        try:
            asyncio.run(log.stream())
            details = jobs.client.get_job_info(job)
            answered = time.monotonic()
            if details.status.is_terminal():
                log.finish()
                return details
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            if (silent := time.monotonic() - answered) > PATIENCE_S:
                raise NoHead(
                    f"the Ray head at {jobs.address} has not answered for {silent:.0f} s ({error}): the job may still "
                    f"run; when the head is back, follow it with `lockstep attach {job} --address {jobs.address}`"
                ) from error
        time.sleep(PAUSE_S)


def exit_code(job: ray_jobs.JobDetails) -> int | None:
    """The exit code of a job, as `cluster/exit_codes.py` has them; None while it has not ended."""
    if not job.status.is_terminal():
        return None
    if job.status is ray_jobs.JobStatus.SUCCEEDED:
        return SUCCESS
    if job.status is ray_jobs.JobStatus.STOPPED:
        return INTERRUPTED
    known = job.driver_exit_code in (FAILED, REFUSED, OUT_OF_TIME, INTERRUPTED)
    return job.driver_exit_code if known else INFRASTRUCTURE  # such as a driver that was killed, or that never began


class _Log:
    """A job's log, of which each character is written once."""

    def __init__(self, jobs: Jobs, job: str, write: Callable[[str], object]) -> None:
        self._client, self._job, self._write = jobs.client, job, write
        self._seen = 0

    def skip_all_but(self, lines: int) -> None:
        """Leave out what is there, except for its last lines."""
        there = self._client.get_job_logs(self._job)
        self._seen = len(there) - sum(map(len, there.splitlines(keepends=True)[-lines:] if lines else []))

    async def stream(self) -> None:
        """Write what comes until the head closes the connection; it begins with the log's first character each time."""
        place = 0
        async for text in self._client.tail_job_logs(self._job):
            self._take(text, place)
            place += len(text)

    def finish(self) -> None:
        """Write what is left of the log of a job that has ended."""
        self._take(self._client.get_job_logs(self._job), 0)

    def _take(self, text: str, place: int) -> None:
        """Write what is new of a text that stands at a place of the log."""
        new = text[max(0, self._seen - place) :]
        if new:
            self._write(new)
        self._seen = max(self._seen, place + len(text))
