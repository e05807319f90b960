"""What `lockstep train` and `lockstep submit` do, as functions of Python: `lockstep.train` and `lockstep.submit`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lockstep.cluster.launch.ray_settings import set_ray_defaults
from lockstep.cluster.recipe.load import resolve
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.records.run_folder import RunFolder

Given = Recipe | Mapping[str, Any] | Path | str
"""A recipe: as an object, as its values, which may have `extends`, as the path of a file, or by the name of one that
ships with the package."""


def train(
    recipe: Given,
    overrides: Mapping[str, Any] | None = None,
    *,
    address: str | None = None,
    resume: bool = False,
    profile: bool = False,
    max_hours: float | None = None,
    quiet: bool = False,
) -> RunFolder:
    """Run all phases of a recipe, as `lockstep train` does; called in the main thread, which signals reach.

    Args:
        overrides: values by dotted key, as `{"rl.group_size": 16}`.
        address: of a Ray cluster to use; one is started on this machine, and stopped, otherwise.
        resume: go on from the run's last checkpoint, where it has saved one.
        profile: trace a few steps of each rank of the trainer.
        max_hours: after so many the run has saved and is gone.
        quiet: print nothing but what workers print.

    Returns:
        The finished run, whose `path`, `summary()`, `metrics()` and `evaluations()` can be read; the last checkpoint is
        `load(run.path)`.

    Raises:
        ValueError: one sentence on what does not fit; nothing is written then.
        lockstep.cluster.run.failures.RunFailed, lockstep.rl.remote.WorkerFailed: when the run ended early; it can go on
            from what it has saved.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the run has saved; `lockstep.cluster.run.interruption.OutOfTime`,
            which is one, when its time is up.
    """
    set_ray_defaults()
    from lockstep.cluster.run.train import train_recipe  # which imports Ray, and that reads the environment

    folder = train_recipe(
        resolve(recipe, overrides),
        Console(quiet=quiet),
        address=address,
        profile=profile,
        resume=resume,
        max_hours=max_hours,
    )
    return RunFolder.open(folder)


@dataclass(frozen=True)
class Job:
    """A job that was submitted to a Ray head."""

    id: str
    address: str
    """Of the head's dashboard."""

    @property
    def exit_code(self) -> int | None:
        """How it ended, as `cluster/exit_codes.py` has it, 0 for success; None while it has not ended.

        Raises:
            ValueError: one sentence on what is wrong with the head, or where the job is gone from it.
        """
        from lockstep.cluster.jobs.client import Jobs
        from lockstep.cluster.jobs.following import exit_code

        return exit_code(Jobs(self.address).find(self.id))

    def wait(self, *, quiet: bool = False) -> int:
        """Follow the job's log until it has ended; returns its exit code.

        Args:
            quiet: do not print the log.

        Raises:
            ValueError: one sentence on what is wrong with the head.
        """
        from lockstep.cluster.jobs.client import Jobs
        from lockstep.cluster.jobs.following import exit_code, follow

        write = Console(quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True).print
        code = exit_code(follow(Jobs(self.address), self.id, lambda text: write(text, end="")))
        assert code is not None
        return code


def submit(
    recipe: Given,
    address: str = "http://127.0.0.1:8265",
    overrides: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    resume: bool = False,
    profile: bool = False,
    environment: Sequence[str] = (),
    max_hours: float | None = None,
    retries: int = 0,
    resubmit: int = 0,
) -> Job:
    """Run a recipe as a job on a Ray head, as `lockstep submit --no-wait` does; `wait` of what it returns follows it.

    Args:
        address: of the head's dashboard.
        overrides: values by dotted key.
        name: what the job is called; as the recipe otherwise.
        resume: go on from the run's last checkpoint, where it has saved one.
        profile: trace a few steps of each rank of the trainer.
        environment: names of environment variables that the job has; a value is taken from this process, or from the
            cluster where it is not set here, and no log has it.
        max_hours: after so many the job has saved and is gone.
        retries: how often its driver is started again after the infrastructure ended it.
        resubmit: how often the rest is submitted again when the time is up.

    Raises:
        ValueError: one sentence on what is wrong with the recipe, or with the head.
    """
    set_ray_defaults()
    from lockstep.cluster.jobs.client import Jobs  # as in `train`
    from lockstep.cluster.jobs.spec import JobSpec
    from lockstep.cluster.jobs.submission import send

    resolved, jobs = resolve(recipe, overrides), Jobs(address)
    spec = JobSpec(resolved, name or resolved.name, resume, profile, max_hours, retries, resubmit, tuple(environment))
    return Job(send(jobs, spec, Console(markup=False, highlight=False).print), jobs.address)
