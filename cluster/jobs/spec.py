"""What a job is to do: a recipe and how to run it. It travels with the job, and stays readable in its metadata."""

import json
import re
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from lockstep.cluster.recipe.load import parse, to_toml
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.run.interruption import deadline

METADATA = "lockstep"
"""Key of a job's metadata that holds its spec."""


class BadSpec(ValueError):
    """A job that cannot be what it is asked to be."""


@dataclass(frozen=True)
class JobSpec:
    """A recipe, and how a job runs it."""

    recipe: Recipe
    """With paths that are absolute."""
    name: str
    """What the job is called; several jobs may have one name."""
    resume: bool = False
    profile: bool = False
    max_hours: float | None = None
    retries: int = 0
    """How often its driver is started again after the infrastructure ended it."""
    resubmit: int = 0
    """How often the rest is submitted again when the time is up."""
    environment: tuple[str, ...] = ()
    """Names of environment variables that its processes have; values are not part of it."""

    def __post_init__(self) -> None:
        deadline(self.max_hours, self.recipe.checkpoints.grace, {}, began=0.0)
        if strange := next((name for name in self.environment if not re.fullmatch(r"[A-Za-z_]\w*", name)), None):
            raise BadSpec(
                f"env={strange!r} is not the name of an environment variable: give the name alone, its value is taken "
                "from here or, where it is not set here, from the cluster"
            )

    def new_id(self) -> str:
        """An id for a job of this name, which paths and URLs can hold."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.name).strip('.-') or 'run'}-{uuid.uuid4().hex[:6]}"

    def resumed(self, **changed: Any) -> "JobSpec":
        """The same job, to go on from its last checkpoint."""
        return replace(self, resume=True, **changed)

    def to_json(self) -> str:
        """The spec as text, the recipe as TOML in it."""
        values = {name: value for name, value in vars(self).items() if name != "recipe"}
        return json.dumps(values | {"recipe": to_toml(self.recipe)})

    @classmethod
    def of_json(cls, text: str) -> Self:
        """The spec of a text; what a newer version has added to it is left out.

        Raises:
            ValueError: when the recipe is none that this version reads.
        """
        values: Mapping[str, Any] = json.loads(text)
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        recipe = parse(tomllib.loads(values["recipe"]))
        return cls(**known | {"recipe": recipe, "environment": tuple(values.get("environment", ()))})
