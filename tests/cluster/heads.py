"""Ray heads, beside all other Rays of this machine."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray.job_submission import JobSubmissionClient

from tests.cluster.cli_process import until


@dataclass(frozen=True)
class Head:
    """A running Ray head."""

    process: subprocess.Popen[bytes]
    address: str
    """Of its dashboard, which takes jobs."""
    cluster: str
    """Where drivers connect."""
    folder: Path

    def answers(self) -> bool:
        """Whether its dashboard takes jobs."""
        try:
            for page in ("version", "jobs/"):  # a client asks for both, and each is served by a part that starts alone
                with urllib.request.urlopen(f"{self.address}/api/{page}", timeout=5) as reply:
                    if reply.status != 200:
                        return False
            return True
        except (OSError, urllib.error.URLError):
            return False

    def check(self) -> None:
        """Raises an AssertionError with the head's own words where it has ended, or its dashboard takes no jobs."""
        if self.process.poll() is None and self.answers():
            return
        logs = [self.folder / "head.log", *self.folder.glob("session_latest/logs/gcs_server.*")]
        said = "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}" for log in logs if log.exists())
        raise AssertionError(f"the shared head ended with {self.process.poll()} or does not answer:\n{said}")


def end_jobs(head: Head) -> None:
    """Stops what a test that failed has left running, which would slow down all that follow."""
    client = JobSubmissionClient(head.address)
    for job in client.list_jobs():
        if job.submission_id and not job.status.is_terminal():
            client.stop_job(job.submission_id)
            until(lambda id=job.submission_id: client.get_job_status(id).is_terminal(), 120)


@contextmanager
def joined(head: Head, cpus: int) -> Iterator[None]:
    """One more node in a head's cluster, on this machine, as another host would join it."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", f"--address={head.cluster}"]
    command += ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--disable-usage-stats"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with (head.folder / "node.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=head.folder, stdout=log, stderr=log, env=environment)
    try:
        yield
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            if one.is_running():
                one.kill()
        process.wait()


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def started(agent_port: int) -> Iterator[Head]:
    """A head whose own environment does not know this repository; its agent takes jobs if the port is free."""
    folder = Path(tempfile.mkdtemp(prefix="ls", dir="/tmp"))  # sockets below it have names of 107 bytes at most
    port, dashboard = free_port(), free_port()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [
        f"--dashboard-agent-listen-port={agent_port}",
        f"--temp-dir={folder}",
        "--num-cpus=4",
        "--include-dashboard=true",
        "--disable-usage-stats",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment | {"RAY_AUTH_MODE": "disabled"},
        )
    head = Head(process, f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", folder)
    try:
        until(lambda: head.answers() or process.poll() is not None, 200)
        assert process.poll() is None, (folder / "head.log").read_text()
        yield head
    finally:
        everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in everything:
            if one.is_running():
                one.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
