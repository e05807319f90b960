"""The first process of a job: starts its driver, `lockstep train`, and again when the infrastructure has ended it.

It is in the driver's process group. So whoever ends the job, by `lockstep stop` or by a loss of its node, ends both: a
signal reaches the driver without the supervisor's help, which only learns that it is not to start another one.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import FrameType

from lockstep.cluster.exit_codes import FAILED, INFRASTRUCTURE, INTERRUPTED, OUT_OF_TIME, REFUSED, SUCCESS
from lockstep.cluster.jobs.client import Jobs
from lockstep.cluster.jobs.sealed_environment import NotSet, unseal
from lockstep.cluster.jobs.spec import JobSpec
from lockstep.cluster.jobs.status import JobStatus, file_name
from lockstep.cluster.jobs.submission import SPEC, send
from lockstep.cluster.recipe.load import to_toml
from lockstep.cluster.recipe.paths import input_paths, missing
from lockstep.cluster.records.run_folder import RunError, RunFolder, holds_run
from lockstep.cluster.run.inputs import MissingInput
from lockstep.cluster.run.interruption import JOB_START

AN_HOUR = 6
"""How often a driver is started again within an hour at most, however many retries are left."""
LONGEST_PAUSE_S = 60.0
"""Between two attempts; the first pause is of a second, and each is twice the one before."""
PUBLISH_S = 2.0
"""Between two writes of the status."""


class Supervisor:
    """Runs the attempts of one job."""

    def __init__(self, spec: JobSpec, status: Path) -> None:
        """
        Args:
            status: the file that says where the job stands.
        """
        self._spec, self._status = spec, status
        self._stopped = threading.Event()
        self._attempt = 1
        self._before = None if spec.resume else self._run_id()
        self._causes: list[str] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def run(self) -> int:
        """Run the job to its end; returns its exit code."""
        threading.Thread(target=self._publish, daemon=True).start()
        began: deque[float] = deque(maxlen=AN_HOUR)
        resume = self._spec.resume
        while True:
            code = self._drive(resume)
            self._write_status()
            if self._stopped.is_set():
                return INTERRUPTED
            if code == OUT_OF_TIME:
                self._submit_rest()
            if code in (SUCCESS, FAILED, REFUSED, OUT_OF_TIME, INTERRUPTED):
                return code
            self._causes.append(self._cause(code))
            resume = resume or self._has_begun()
            if self._gives_up(began):
                return INFRASTRUCTURE
            self._stopped.wait(min(LONGEST_PAUSE_S, 2.0 ** (self._attempt - 1)))
            if self._stopped.is_set():
                return INTERRUPTED
            began.append(time.monotonic())
            self._attempt += 1
            _say(f"attempt {self._attempt} of {self._spec.retries + 1}: {'resuming' if resume else 'beginning again'}")

    def _drive(self, resume: bool) -> int:
        """One attempt: its exit code, or less than 0 where a signal ended it."""
        spec = self._spec
        options = [*(["--resume"] if resume else []), *(["--profile"] if spec.profile else [])]
        if spec.max_hours is not None:
            options += ["--max-hours", str(spec.max_hours)]
        command = [sys.executable, "-m", "lockstep", "train", "recipe.toml", *options]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL).wait()

    def _gives_up(self, began: "deque[float]") -> bool:
        """Whether no further attempt is to follow; says why each one before has ended, the first one first."""
        within = [one for one in began if time.monotonic() - one < 3600]
        if len(self._causes) <= self._spec.retries and len(within) < AN_HOUR:
            _say(f"attempt {self._attempt} ended: {self._causes[-1]}")
            return False
        if self._spec.retries:
            bound = f"{AN_HOUR} within an hour" if len(self._causes) <= self._spec.retries else str(self._spec.retries)
            later = "; then ".join(self._causes[1:])
            _say(f"no retry is left of {bound}; the first cause: {self._causes[0]}{later and f'; then {later}'}")
        return True

    def _cause(self, code: int) -> str:
        """Why an attempt has ended, in a line."""
        if code < 0:
            return f"the driver was killed by {signal.Signals(-code).name}"
        error = RunFolder.open(self._spec.recipe.folder).summary().get("error") if self._has_begun() else None
        return str(error).strip().splitlines()[0] if error else f"the driver ended with exit code {code}"

    def _run_id(self) -> str | None:
        """The id of the run that lies in the recipe's folder."""
        try:
            folder = self._spec.recipe.folder
            return RunFolder.open(folder).id if holds_run(folder) else None
        except RunError:
            return None

    def _has_begun(self) -> bool:
        """Whether the run that lies in the recipe's folder is the job's, and not one from before that it replaces."""
        return self._run_id() not in (None, self._before)

    def _submit_rest(self) -> None:
        """Submit what is left of a job whose time is up, where that was asked for."""
        if not self._spec.resubmit:
            return
        left = self._spec.resubmit - 1
        try:
            job = send(Jobs(_dashboard()), self._spec.resumed(resubmit=left), _say)
        except ValueError as error:
            _say(f"out of time, and the rest was not submitted: {error}")
        else:
            _say(f"out of time: the rest is the job {job}, and {left} more may follow")

    def _publish(self) -> None:
        while True:
            with suppress(OSError):  # such as a full disk; the next one may succeed
                self._write_status()
            time.sleep(PUBLISH_S)

    def _write_status(self) -> None:
        status = JobStatus.of(self._spec.recipe, self._attempt) if self._has_begun() else JobStatus(self._attempt)
        status.write(self._status)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self._stopped.set()


def main() -> int:
    """Run the job that the working directory describes; returns its exit code."""
    here = Path.cwd()
    said = json.loads((here / SPEC).read_text(encoding="utf-8"))
    spec = JobSpec.of_json(said["spec"])
    (here / "recipe.toml").write_text(to_toml(spec.recipe), encoding="utf-8")
    os.environ.setdefault(JOB_START, str(time.time()))
    try:
        unseal(spec.environment, os.environ, here)
    except NotSet as error:
        _say(f"error: {error}")
        return REFUSED
    for key, path in missing(input_paths(spec.recipe)).items():
        _say(f"error: {MissingInput(os.uname().nodename, key, path)}")
        return REFUSED
    log = Path(os.readlink("/proc/self/fd/1"))  # Ray lets a job write into a file in the folder of the node's logs
    return Supervisor(spec, log.with_name(file_name(said["id"]))).run()


def _dashboard() -> str:
    """The address of the dashboard of the cluster that the job runs on."""
    from ray.dashboard.utils import ray_address_to_api_server_url

    return str(ray_address_to_api_server_url(os.environ["RAY_ADDRESS"]))


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
