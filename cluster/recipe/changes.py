"""What of a recipe may change where a run resumes, and what has changed.

A run may go on for longer, at another learning rate, in another layout and on other machines. What it learns from, what
it maximises and what the model is stay as they were: anything else is another run, which may start from its weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lockstep.cluster.recipe.schema import Recipe

MAY_CHANGE = (
    "run",
    "checkpoints.*",
    "layout.*",
    "trainer.row_tokens",
    "trainer.recompute",
    "trainer.compile",
    "rollout.workers",
    "rollout.tensor",
    "rollout.sequences",
    "rollout.cache_gib",
    "rollout.budget",
    "rollout.speculate",
    "rollout.bucket_mib",
    "rollout.transport",
    "recovery.*",
    "roles.*.place",
    "roles.*.cpus",
    "roles.*.gpus",
    "roles.*.layout",
    "roles.*.layout.*",
    "verifier.workers",
    "verifier.processes",
    "verifier.sandbox.requires",
    "verifier.llm_judge.url",
    "verifier.llm_judge.api_key_env",
    "verifier.llm_judge.timeout_s",
    "verifier.llm_judge.retries",
    "verifier.llm_judge.patience_s",
    "verifier.llm_judge.concurrent",
    "verifier.llm_judge.budget",
    "environment.workers",
    "environment.processes",
    "evaluation.*",
    "*.evaluate_every",
    "*.steps",
    "*.optimizer.learning_rate",
    "*.optimizer.warmup_steps",
    "*.optimizer.schedule",
    "*.optimizer.decay_share",
    "*.optimizer.final_share",
    "*.optimizer.weight_decay",
    "*.optimizer.clip_norm",
    "pretrain.statistics_every",
    "pretrain.give_up_after",
    "pretrain.spikes",
    "pretrain.spikes.*",
    "rl.flow.release",
)
"""Keys, where * stands for any text. Steps of a phase that is over stay as they were; see `launch/resume.py`."""


@dataclass(frozen=True)
class Change:
    """A key of the recipe that has another value than before; None where there was, or is, none."""

    key: str
    old: Any
    new: Any

    @property
    def is_allowed(self) -> bool:
        """Whether a run may resume in spite of it."""
        return any(fnmatchcase(self.key, pattern) for pattern in MAY_CHANGE)

    def __str__(self) -> str:
        return f"{self.key} {_said(self.old)} → {_said(self.new)}"


def changes(before: Recipe, now: Recipe) -> tuple[Change, ...]:
    """The keys whose values differ."""
    old, new = (dict(_leaves(recipe.model_dump(mode="json"))) for recipe in (before, now))
    keys = dict.fromkeys([*old, *new])
    return tuple(Change(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key))


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Values by key; the elements of a list of sections have a number: `pretrain.data.blend[1].path`."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}[{number}]")
    else:
        yield key, value


def _said(value: Any) -> str:
    return "(none)" if value is None else str(value)
