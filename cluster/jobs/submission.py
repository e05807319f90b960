"""Submits a recipe as a Ray job: a supervisor on the head's cluster runs the same recipe with this package.

The package travels with the job, and so do modules that the recipe names. What paths in the recipe name does not: they
are sent absolute, and mean files of the cluster's nodes, which are the submitter's own where both see one file system.
"""

import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.cluster.jobs.client import Jobs, NoHead
from lockstep.cluster.jobs.package import check_size, copy_functions, copy_package
from lockstep.cluster.jobs.sealed_environment import seal
from lockstep.cluster.jobs.spec import METADATA, JobSpec
from lockstep.cluster.run.interruption import CLEAN_UP_S
from lockstep.data.tasks.user_function import module_search

SPEC = "job.json"
"""The file in a job's working directory that says what it is to do."""
PATIENCE_S = 60.0
"""Seconds in which a head may close connections, or have no agent, before it takes a job."""
NO_AGENT = "No available agent"
"""What Ray's head says as long as none of its agents has registered."""


def send(jobs: Jobs, spec: JobSpec, say: Callable[[str], object]) -> str:
    """Submit a job; returns its id.

    Args:
        say: told of modules that do not travel, as a user should know.

    Raises:
        BadModule: when a function of the user's cannot travel.
        NoHead: when the head does not answer, or takes no jobs.
        TooLarge: when the code that would travel is more than it takes.
    """
    id = spec.new_id()
    with tempfile.TemporaryDirectory() as folder:
        working, package = Path(folder) / "job", copy_package(Path(folder))
        working.mkdir()
        recipe, missing = copy_functions(spec.recipe, working, module_search())
        for name in missing:
            say(f"the module {name} is not found here, and has to be installed on the cluster's nodes")
        spec = replace(spec, recipe=recipe)
        (working / SPEC).write_text(json.dumps({"id": id, "spec": spec.to_json()}), encoding="utf-8")
        for each in (working, package):
            check_size(each)
        environment: dict[str, Any] = {
            "working_dir": str(working),
            "py_modules": [str(package)],
            # Ray kills a job that is stopped after 3 s, and the run saves first
            "env_vars": seal(spec.environment, os.environ, working)
            | {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(spec.recipe.checkpoints.grace + CLEAN_UP_S))},
        }
        _submit(jobs, id, spec, environment)
    return id


def _submit(jobs: Jobs, id: str, spec: JobSpec, environment: dict[str, Any]) -> None:
    """Submit a job under an id, again where the connection closes before the head has said whether it took it.

    A head that has just started has no agent yet, which takes the jobs; it waits for 10 s by itself.
    """
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            jobs.client.submit_job(
                entrypoint=f"{_python()} -m lockstep.cluster.jobs.supervisor",
                submission_id=id,
                runtime_env=environment,
                metadata={METADATA: spec.to_json()},
            )
            return
        except OSError as error:
            if _is_there(jobs, id):
                return
            if time.monotonic() > end:
                raise NoHead(
                    f"the Ray head at {jobs.address} closed the connection while it took the job ({error}): see its "
                    "dashboard's log, or what stands between it and this machine"
                ) from error
        except RuntimeError as error:
            if NO_AGENT not in str(error) or time.monotonic() > end:
                raise NoHead(
                    f"the Ray head at {jobs.address} took no job ({error}): where another Ray on its machine has the "
                    "port of its agent, start it with another --dashboard-agent-listen-port"
                ) from error
        time.sleep(1)


def _is_there(jobs: Jobs, id: str) -> bool:
    """Whether the head knows a job."""
    with suppress(OSError, RuntimeError):
        jobs.client.get_job_info(id)
        return True
    return False


def _python() -> str:
    """This interpreter where the head has it, too; elsewhere whatever `python` is there."""
    here = shlex.quote(sys.executable)
    return f"$([ -x {here} ] && echo {here} || echo python)"
