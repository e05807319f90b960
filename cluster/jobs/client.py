"""Reaches the dashboard of a Ray head, which takes jobs and answers for them; what goes wrong there is one sentence."""

import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray.job_submission as jobs
from ray.exceptions import AuthenticationError

from lockstep.cluster.exit_codes import Unreachable
from lockstep.cluster.jobs.spec import METADATA, JobSpec
from lockstep.cluster.launch.ray_session import ANSWER_S, NoToken

DASHBOARD_PORT, DRIVER_PORT = 8265, 6379
"""Ray's own defaults."""
TALKATIVE = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk")
"""Ray's loggers that tell of each upload and connection."""


class NoHead(Unreachable):
    """No Ray head answers at the address, or it takes no job."""


class NoJob(ValueError):
    """No such job is on the head."""


class Jobs:
    """The jobs of one head."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: of the head's dashboard, with or without `http://`.

        Raises:
            NoHead: when nothing answers there.
            NoToken: when it wants a token that is not given.
        """
        self.address = with_scheme(address)
        for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(variable, None)  # Ray would prefer it to the address that was asked for
        with self.answering():
            with suppress(urllib.error.HTTPError):  # an answer, too: the client below says what it means
                urllib.request.urlopen(f"{self.address}/api/version", timeout=ANSWER_S).close()
            self.client = jobs.JobSubmissionClient(self.address)
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """A block that asks the head; when it does not answer, that is one sentence.

        Raises:
            NoHead: when it does not answer, or not as a Ray head does.
            NoToken: when it wants another token.
        """
        try:
            yield
        except AuthenticationError as error:
            raise NoToken(self.address) from error
        except (OSError, RuntimeError, ValueError) as error:
            port = f", and not {DRIVER_PORT}, which is for drivers" if self.address.endswith(f":{DRIVER_PORT}") else ""
            raise NoHead(
                f"no Ray head answers at {self.address} ({_first_line(error)}): start one with `ray start --head`, or "
                f"correct the address, which is that of its dashboard, on port {DASHBOARD_PORT}{port}"
            ) from error

    def all(self) -> list[jobs.JobDetails]:
        """All jobs that were submitted as recipes, the newest first.

        Raises:
            NoHead: when the head does not answer.
        """
        with self.answering():
            found = [job for job in self.client.list_jobs() if METADATA in (job.metadata or {})]
        return sorted(found, key=lambda job: -(job.start_time or 0))

    def find(self, given: str) -> jobs.JobDetails:
        """A job by its id, or the newest one by its name.

        Raises:
            NoJob: when there is none.
            NoHead: when the head does not answer.
        """
        known = self.all()
        for job in known:
            if job.submission_id == given:
                return job
        for job in known:
            if name_of(job) == given:
                return job
        names = ", ".join(str(job.submission_id) for job in known[:5]) or "none"
        raise NoJob(f"there is no job {given} at {self.address}: the newest there are {names}")

    def status_file(self, job: jobs.JobDetails, name: str) -> str | None:
        """The text of a small file that a job has written beside its log; None where there is none to be had."""
        asked = {"node_id": job.driver_node_id, "filename": name, "lines": -1, "timeout": int(ANSWER_S)}
        if job.driver_node_id is None:
            return None
        with self.answering():  # the client knows certificates and tokens; Ray has no public call for this page
            reply = self.client._do_request("GET", f"/api/v0/logs/file?{urllib.parse.urlencode(asked)}")
        return str(reply.text) if reply.status_code == 200 else None


def with_scheme(address: str) -> str:
    """The URL of a dashboard, of which `http://` may be left out.

    Raises:
        NoHead: when the address is none of a dashboard.
    """
    scheme, separator, _ = address.partition("://")
    if separator and scheme not in ("http", "https"):
        raise NoHead(
            f"address={address} is for drivers, and jobs are submitted to the head's dashboard: give "
            f"http://host:{DASHBOARD_PORT}"
        )
    return (address if separator else f"http://{address}").rstrip("/")


def spec_of(job: jobs.JobDetails) -> JobSpec:
    """What a job was to do.

    Raises:
        ValueError: when its recipe is none that this version reads.
    """
    return JobSpec.of_json((job.metadata or {})[METADATA])


def name_of(job: jobs.JobDetails) -> str:
    """What a job is called."""
    return str(json.loads((job.metadata or {})[METADATA])["name"])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
