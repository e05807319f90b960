"""What a study is: settings, cells (a place on its axis with a seed), and a function that measures a model in one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lockstep.data.tasks.task import TaskConfig
from lockstep.data.tokenizer import Tokenizer
from lockstep.model.config import ModelConfig
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.verifiers.judge import Judge

Values = dict[str, Any]
"""Measures by name; those that are numbers get into tables and plots, the others into the JSON lines alone."""


@dataclass(frozen=True)
class Workload:
    """Problems that a model answers, and how answers are judged."""

    task: TaskConfig
    seed: int
    verifier: VerifierConfig


@dataclass(frozen=True)
class Subject:
    """A model under study, opened as a rollout engine."""

    engine: RolloutEngine
    tokenizer: Tokenizer
    workload: Workload | None
    """Of a study that `needs_problems`."""
    judge: Judge | None = None
    """Of such a study, too."""


class StudySettings(BaseModel):
    """What every study is told; a study adds keys of its own, and one with the name of its axis."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: int = Field(3, ge=3, le=1000, description="repetitions with seeds of their own, which intervals are over")


Measure = Callable[[Subject, Any, float, int], Values]
"""From the model, the settings, a place on the axis and a seed to measures."""


@dataclass(frozen=True)
class Study:
    """One study, as its module in `catalog` defines it."""

    settings: type[StudySettings]
    axis: str
    """The key of the settings that lists the places, and the axis' name below plots."""
    units: Mapping[str, str]
    """The unit of each measure that is a number, by its name, in the order of the table."""
    measure: Measure
    check: Callable[[ModelConfig, Any], None] = lambda model, settings: None
    """Refuses settings that a model has no room for, by a ValueError, before any model is measured."""
    needs_problems: bool = False
    slopes: Sequence[str] = ()
    """Measures whose exponent over the axis is fitted: the slope of their logarithms."""

    def places(self, settings: StudySettings) -> tuple[float, ...]:
        """The places on the axis, in the order given."""
        found: tuple[float, ...] = getattr(settings, self.axis)
        return found
