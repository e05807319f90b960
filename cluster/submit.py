"""A recipe as a job on a running Ray head: thin, the same recipe and the same program over there."""

import asyncio
import shlex
import tempfile
from pathlib import Path

import ray.job_submission as jobs
from rich.console import Console

import lockstep
from lockstep.cluster.config import Recipe, to_toml


class NoHead(ValueError):
    """No Ray head answers at the address."""


def submit(recipe: Recipe, address: str, console: Console) -> int:
    """Run `lockstep train` on the head and follow its log.

    Returns:
        0 when the job succeeded, 1 otherwise.

    Raises:
        NoHead: when nothing answers at the address.
    """
    try:
        client = jobs.JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise NoHead(
            f"no Ray head answers at {address}: start one with `ray start --head`, or correct --address"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.toml").write_text(to_toml(recipe))
        job = client.submit_job(
            entrypoint=f"python -m lockstep train recipe.toml --set {shlex.quote(f'run={recipe.folder.resolve()}')}",
            runtime_env={"working_dir": folder, "py_modules": [str(Path(lockstep.__file__).parent)]},
        )
    console.print(f"job {job}")
    try:
        asyncio.run(_follow(client, job, console))
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    status = client.get_job_status(job)
    console.print(f"job {job}: {status.value.lower()}")
    return 0 if status is jobs.JobStatus.SUCCEEDED else 1


async def _follow(client: jobs.JobSubmissionClient, job: str, console: Console) -> None:
    async for text in client.tail_job_logs(job):
        console.print(text, end="", markup=False, highlight=False)
