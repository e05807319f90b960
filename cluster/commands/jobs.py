"""The commands that submit recipes as jobs to a Ray head and look after them: submit, jobs, logs, stop, resume …

Exit codes are those of `cluster/exit_codes.py`, of the job where a command follows it.
"""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cluster.commands.console import err, out, sentences
from lockstep.cluster.commands.options import MaxHours, Overrides, Profile, RecipeName, Resume, overriding
from lockstep.cluster.exit_codes import INTERRUPTED

if TYPE_CHECKING:
    from lockstep.cluster.jobs.client import Jobs
    from lockstep.cluster.jobs.spec import JobSpec

Address = Annotated[str, typer.Option(help="The dashboard of a running Ray head.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or its name for the newest of that name.")]
StopOnInterrupt = Annotated[
    bool, typer.Option("--stop-on-interrupt", help="Let Ctrl-C stop the job, which saves; it goes on otherwise.")
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Print the job's id and do not follow its log.")]
DASHBOARD = "http://127.0.0.1:8265"
ATTACHED_LINES = 20
"""Of a job's log that were there before, as `attach` shows them."""


@sentences
def submit(
    recipe: RecipeName,
    address: Address = DASHBOARD,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="What the job is called; as the recipe otherwise.")] = None,
    resume: Resume = False,
    profile: Profile = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="An environment variable of the job: its value is taken from here, or from the cluster where it is "
            "not set here, and no log has it.",
        ),
    ] = None,
    max_hours: MaxHours = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Start the driver again so often where the infrastructure ended it.")
    ] = 0,
    resubmit: Annotated[int, typer.Option(min=0, help="Submit the rest so often when the time is up.")] = 0,
    no_wait: NoWait = False,
    stop_on_interrupt: StopOnInterrupt = False,
) -> None:
    """Run a recipe, as it is here, as a Ray job, follow its log, and end with its exit code.

    Ctrl-C leaves the job running.

    Exit codes: 0 finished, 1 failed, 2 refused, 75 infrastructure, 124 out of time, 130 interrupted or stopped.

    Example: lockstep submit quickstart --address http://head:8265
    """
    from lockstep.cluster.jobs.client import Jobs
    from lockstep.cluster.jobs.spec import JobSpec
    from lockstep.cluster.recipe.load import load_recipe

    with overriding():
        resolved = load_recipe(recipe, overrides or [])
    called = resolved.name if name is None else name
    spec = JobSpec(resolved, called, resume, profile, max_hours, retries, resubmit, tuple(env or ()))
    _send(Jobs(address), spec, follows=not no_wait, stop_on_interrupt=stop_on_interrupt)


@sentences
def list_jobs(address: Address = DASHBOARD) -> None:
    """Print a table of the jobs of a head, the newest first.

    Example: lockstep jobs --address http://head:8265
    """
    from lockstep.cluster.jobs.client import Jobs
    from lockstep.cluster.jobs.table import table

    for line in table(Jobs(address)):
        out.print(line, highlight=False)


@sentences
def logs(
    job: JobName,
    address: Address = DASHBOARD,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends, with its exit code.")
    ] = False,
) -> None:
    """Print a job's log.

    Example: lockstep logs -f quickstart
    """
    from lockstep.cluster.jobs.client import Jobs

    jobs = Jobs(address)
    id = _id_of(jobs, job)
    if follow:
        _follow(jobs, id)
    else:
        with jobs.answering():
            _write(jobs.client.get_job_logs(id))


@sentences
def attach(job: JobName, address: Address = DASHBOARD, stop_on_interrupt: StopOnInterrupt = False) -> None:
    """Follow a job's log from its last lines on, and end with the job's exit code.

    Example: lockstep attach quickstart --address http://head:8265
    """
    from lockstep.cluster.jobs.client import Jobs

    jobs = Jobs(address)
    _follow(jobs, _id_of(jobs, job), tail=ATTACHED_LINES, stop_on_interrupt=stop_on_interrupt)


@sentences
def stop(job: JobName, address: Address = DASHBOARD) -> None:
    """End a job after the step under way; it saves first, and goes on by `lockstep resume`.

    Example: lockstep stop quickstart --address http://head:8265
    """
    from lockstep.cluster.jobs.client import Jobs

    jobs = Jobs(address)
    id = _id_of(jobs, job)
    _stop(jobs, id)
    _follow(jobs, id, tail=0, expected=INTERRUPTED)


@sentences
def resume(
    job: JobName,
    address: Address = DASHBOARD,
    overrides: Overrides = None,
    no_wait: NoWait = False,
    stop_on_interrupt: StopOnInterrupt = False,
) -> None:
    """Submit a job that has ended again, to go on from its run's last checkpoint, as a job of the same name.

    Example: lockstep resume quickstart --set layout.data=4
    """
    from dataclasses import replace

    from lockstep.cluster.jobs.client import Jobs, spec_of
    from lockstep.cluster.recipe.load import changed

    jobs = Jobs(address)
    before = jobs.find(job)
    if not before.status.is_terminal():
        raise StillRuns(f"the job {before.submission_id} has not ended: follow it with `lockstep attach`, or stop it")
    spec = spec_of(before)
    with overriding():
        spec = replace(spec.resumed(), recipe=changed(spec.recipe, overrides or []))
    _send(jobs, spec, follows=not no_wait, stop_on_interrupt=stop_on_interrupt)


class StillRuns(ValueError):
    """A job that cannot go on because it has not ended."""


def _send(jobs: "Jobs", spec: "JobSpec", *, follows: bool, stop_on_interrupt: bool) -> None:
    """Submit a job and print its id, and follow it where that is wanted."""
    from lockstep.cluster.jobs.submission import send

    id = send(jobs, spec, out.print)
    out.print(f"job {id}")
    if follows:
        _follow(jobs, id, stop_on_interrupt=stop_on_interrupt)


def _id_of(jobs: "Jobs", given: str) -> str:
    return str(jobs.find(given).submission_id)


def _stop(jobs: "Jobs", id: str) -> None:
    with jobs.answering():
        jobs.client.stop_job(id)


def _follow(
    jobs: "Jobs", id: str, *, tail: int | None = None, stop_on_interrupt: bool = False, expected: int = 0
) -> None:
    """Print a job's log to its end, say how it ended, and end with its exit code, or with 0 where that is expected."""
    from lockstep.cluster.jobs.following import exit_code, follow

    try:
        ended = follow(jobs, id, _write, tail=tail)
    except KeyboardInterrupt:
        if stop_on_interrupt:
            _stop(jobs, id)
            err.print(f"the job {id} is told to end, and saves first")
        else:
            err.print(f"the job {id} goes on: follow it with `lockstep attach {id} --address {jobs.address}`")
        raise
    code = exit_code(ended)
    assert code is not None
    out.print(f"job {id}: {ended.status.value.lower()}, exit code {code}")
    raise typer.Exit(0 if code == expected else code)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
