"""Submits a recipe as a Ray job: the head runs the same recipe with this package.

The package travels with the job. What paths in the recipe name does not: they are sent absolute, and mean the head's
files, which are the submitter's own where both see one file system.
"""

import asyncio
import math
import os
import shlex
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import ray.job_submission as jobs
from ray.exceptions import AuthenticationError
from rich.console import Console

import lockstep
from lockstep.cluster.launch.ray_session import ANSWER_S
from lockstep.cluster.recipe.load import to_toml
from lockstep.cluster.recipe.paths import with_absolute_paths
from lockstep.cluster.recipe.schema import Recipe

CLEAN_UP_S = 30
"""Seconds that the end of a run may take after its last checkpoint."""


class NoHead(ValueError):
    """No Ray head answers at the address, or it takes no job."""


def submit_recipe(recipe: Recipe, address: str, console: Console) -> int:
    """Run `lockstep train` on the head and follow its log.

    Returns:
        0 when the job succeeded, 1 otherwise.

    Raises:
        NoHead: when nothing answers at the address, the head takes no jobs or wants a token that is not given.
    """
    client = _client(address)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.toml").write_text(to_toml(with_absolute_paths(recipe)), encoding="utf-8")
        environment = {
            "working_dir": folder,
            "py_modules": [str(Path(lockstep.__file__).parent)],
            "excludes": ["__pycache__"],
            # Ray kills a job that is stopped after 3 s, and the run saves first
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(recipe.checkpoints.grace + CLEAN_UP_S))},
        }
        try:
            job = client.submit_job(entrypoint=f"{_python()} -m lockstep train recipe.toml", runtime_env=environment)
        except RuntimeError as error:
            raise NoHead(
                f"the Ray head at {address} took no job ({error}): where another Ray on its machine has the port of "
                "its agent, start it with another --dashboard-agent-listen-port"
            ) from error
    console.print(f"job {job}")
    try:
        asyncio.run(_follow(client, job, console))
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    status = client.get_job_status(job)
    console.print(f"job {job}: {status.value.lower()}")
    return 0 if status is jobs.JobStatus.SUCCEEDED else 1


def _client(address: str) -> jobs.JobSubmissionClient:
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(variable, None)  # Ray would prefer it to the address that was asked for
    try:
        with suppress(urllib.error.HTTPError):  # an answer, too: the client below says what it means
            urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_S).close()
        return jobs.JobSubmissionClient(address)
    except AuthenticationError as error:
        raise NoHead(
            f"the Ray head at {address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the head's own"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise NoHead(
            f"no Ray head answers at {address} ({error}): start one with `ray start --head`, or correct the address"
        ) from error


def _python() -> str:
    """This interpreter where the head has it, too; elsewhere whatever `python` is there."""
    here = shlex.quote(sys.executable)
    return f"$([ -x {here} ] && echo {here} || echo python)"


async def _follow(client: jobs.JobSubmissionClient, job: str, console: Console) -> None:
    async for text in client.tail_job_logs(job):
        console.print(text, end="", highlight=False, soft_wrap=True)
