"""What a job says of itself while it runs: a small file beside its log, which the head's dashboard serves.

So a client needs to reach the dashboard alone, and reads one line instead of a log. The driver knows nothing of it: the
supervisor makes it from the last line of the run's own metrics.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from lockstep.cluster.atomic_files import replace_file
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.records.run_folder import METRICS

TAIL_BYTES = 1 << 16
"""Of the metrics' file, in which the last line of a step is looked for."""


@dataclass(frozen=True)
class JobStatus:
    """Where a job stands, as of the last step that it has taken."""

    attempt: int = 1
    phase: str | None = None
    step: int = 0
    steps: int = 0
    """Of the phase."""
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    """That are trained on, for each process of the policy, which has one GPU where there are any."""
    mfu: float | None = None
    reward: float | None = None
    loss: float | None = None

    @classmethod
    def of(cls, recipe: Recipe, attempt: int) -> Self:
        """The status of a run that is under way, by its folder."""
        steps = phases(recipe)
        line = next((line for line in _last_lines(recipe.folder / METRICS) if line.get("phase") in steps), None)
        if line is None:
            return cls(attempt)
        speed = line.get("train_tokens_per_second")
        return cls(
            attempt,
            line["phase"],
            line["step"],
            steps[line["phase"]],
            line.get("step_seconds"),
            None if speed is None else speed / recipe.layout.processes,
            line.get("mfu"),
            line.get("reward"),
            line.get("loss"),
        )

    def write(self, path: Path) -> None:
        """Replace the file by this status."""
        replace_file(path, json.dumps(asdict(self)).encode() + b"\n")

    @classmethod
    def of_json(cls, text: str | None) -> Self:
        """The status of a file's text; that of a job which has taken no step where it says nothing."""
        try:
            values: Mapping[str, Any] = json.loads(text or "{}")
        except ValueError:
            values = {}
        return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})


def file_name(job: str) -> str:
    """The name of a job's status file, in the folder of its node's logs."""
    return f"lockstep-{job}.json"


def phases(recipe: Recipe) -> dict[str, int]:
    """Steps of each phase of a recipe, by its name in records."""
    preference = recipe.preference.phase if recipe.preference else "preference"
    found = {"pretrain": recipe.pretrain, "sft": recipe.supervised, preference: recipe.preference, "rl": recipe.rl}
    return {name: phase.steps for name, phase in found.items() if phase}


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines at a file's end, the last one first; none where there is no such file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            whole = file.read().rpartition(b"\n")[0].split(b"\n")
    except OSError:
        return []
    lines = whole[1:] if size > TAIL_BYTES else whole
    return [json.loads(line) for line in reversed(lines) if line]
