"""A recipe: one TOML file, composed of the configurations that stand beside the code they configure.

Any key can be overridden as `section.key=value`. What is wrong is said in one sentence that names the key, what was
given, what is allowed and the nearest valid key.
"""

import copy
import difflib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lockstep.cluster.roles import RolesConfig
from lockstep.cluster.sources import SourceConfig
from lockstep.data.tasks.task import TaskConfig
from lockstep.distributed.checkpoint.saver import CheckpointConfig
from lockstep.distributed.checkpoint.storage import Folder, Storage, is_url, storage_of
from lockstep.distributed.layout import Layout
from lockstep.model.training.config import PretrainConfig, TrainerConfig
from lockstep.rl.algorithms.config import PreferenceConfig, RLConfig, SupervisedConfig
from lockstep.rl.algorithms.rewards import RewardConfig
from lockstep.rl.environments.config import EnvironmentConfig
from lockstep.rl.rollout.config import RolloutConfig
from lockstep.rl.verifiers.config import VerifierConfig


class RecipeError(ValueError):
    """A recipe that cannot run, in one sentence."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EvaluationConfig(_Section):
    """Greedy exact match on held-out problems, before and after each phase."""

    max_new_tokens: int = Field(64, ge=1)


class Recipe(_Section):
    """Everything that a run depends on."""

    name: str = "run"
    seed: int = Field(0, ge=0)
    run: str = Field("runs/{name}", description="the folder that the run leaves; {name} stands for the recipe's name")
    checkpoints: CheckpointConfig = CheckpointConfig()
    model: SourceConfig = SourceConfig()
    task: TaskConfig = TaskConfig()
    layout: Layout = Layout()
    trainer: TrainerConfig = TrainerConfig()
    rollout: RolloutConfig = RolloutConfig()
    roles: RolesConfig = RolesConfig()
    verifier: VerifierConfig = VerifierConfig()
    reward: RewardConfig = RewardConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    pretrain: PretrainConfig | None = None
    supervised: SupervisedConfig | None = None
    preference: PreferenceConfig | None = None
    rl: RLConfig | None = None

    @model_validator(mode="after")
    def _has_one_kind_of_training(self) -> "Recipe":
        if self.pretrain and (self.supervised or self.preference or self.rl):
            raise ValueError(
                "a recipe trains on text, with [pretrain], or on problems, with [supervised], [preference] and [rl]"
            )
        return self

    @model_validator(mode="after")
    def _has_one_order_of_sums(self) -> "Recipe":
        exact, degrees = self.model.numerics == "exact", (self.rollout.tensor, self.layout.tensor)
        if exact and self.trainer.compile:
            raise ValueError(
                "trainer.compile=true lets a compiler order sums, which model.numerics='exact' fixes: set one of them"
            )
        if exact and self.rl and degrees[0] != degrees[1]:
            raise ValueError(
                f"rollout.tensor={degrees[0]} and layout.tensor={degrees[1]} add up other parts, "
                "and model.numerics='exact' needs the same ones: make them equal"
            )
        return self

    @model_validator(mode="after")
    def _punishes_length_once(self) -> "Recipe":
        if self.rl and self.rl.overlong_share and self.reward.overlong.weight:
            raise ValueError(
                f"rl.overlong_share={self.rl.overlong_share} and reward.overlong.weight="
                f"{self.reward.overlong.weight} punish the same length twice: make one of them 0"
            )
        return self

    @model_validator(mode="after")
    def _has_entries_to_score(self) -> "Recipe":
        if self.environment.kind == "gym" and self.task.grader != "gym":
            raise ValueError(
                f"environment.kind='gym' scores entries of reasoning-gym, and task.grader={self.task.grader!r} gives "
                "answers: set task.grader='gym'"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        return Path(self.run.replace("{name}", self.name))

    @property
    def saves(self) -> Storage:
        """Where its checkpoints go."""
        at = self.checkpoints.at
        return storage_of(at) if is_url(at) else Folder((Path(at) if at else self.folder / "checkpoints").absolute())


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides.

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    if not path.is_file():
        raise RecipeError(
            f"there is no recipe {path}: give the path of a .toml file, for example recipes/quickstart.toml"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): give a recipe that can") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    return parse(values, overrides)


def parse(values: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from plain values and `key=value` overrides.

    Raises:
        RecipeError: one sentence on the first thing that is wrong.
    """
    values = copy.deepcopy(values)
    for override in overrides:
        _apply(values, override)
    for key, value in _leaves(values):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{key}={value} is not allowed: give a finite number")
    try:
        return Recipe.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(validation_sentence(error, Recipe)) from error


def parse_layout(text: str) -> Layout:
    """A layout from its keys, as in "tensor=2,sequence=true".

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    values: dict[str, Any] = {}
    for part in filter(None, map(str.strip, re.split(r",(?![^\[]*\])", text))):  # not at the commas of a list
        _apply(values, part)
    try:
        return Layout.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise RecipeError(f"--layouts {text!r}: {validation_sentence(error, Layout)}") from error


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def validation_sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing that is wrong, as one sentence; it names the key, what was given and what is allowed."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        return f"{key} is not a key of this recipe{_nearest(place, model)}"
    reason = str(first.get("ctx", {}).get("error", "")) or first["msg"][0].lower() + first["msg"][1:]
    if first["type"] in ("model_type", "model_attributes_type"):
        reason = f"it is a section with the keys {', '.join(_siblings([*place, ''], model))}"
    return f"{key}={json.dumps(first['input'], default=str)} is not allowed: {reason}" if place else reason


def _apply(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    *sections, last = (part.strip() for part in name.split("."))
    if not separator or not all([*sections, last]):
        raise RecipeError(f"--set {override!r} is not of the form section.key=value, for example --set rl.group_size=8")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override!r}: {section} is a value, not a section")
    values[last] = _value(text.strip(), wants_text=_annotation([*sections, last]) is str)


def _value(text: str, *, wants_text: bool) -> Any:
    """TOML where it parses, else the text itself, so that strings need no quotes."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if wants_text and not isinstance(value, str) else value


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nearest(place: Sequence[str], model: type[BaseModel]) -> str:
    """The key that was probably meant: the fewest edits of its last part, then the longest way in common."""

    def distance(key: str) -> tuple[int, int, int, float]:
        parts = key.split(".")
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(parts, place, strict=False)))
        likeness = difflib.SequenceMatcher(None, parts[-1], place[-1]).ratio()
        return _edits(parts[-1], place[-1]), -common, abs(len(parts) - len(place)), -likeness

    siblings = _siblings(place, model)
    return f"; the nearest is {min(_keys(model), key=distance)}" + (
        f", and keys here are {', '.join(siblings)}" if siblings else ""
    )


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance: letters to insert, drop or replace."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def _siblings(place: Sequence[str], model: type[BaseModel]) -> list[str]:
    return [key for key in _keys(model) if key.split(".")[:-1] == list(place[:-1])]


def _keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    """Every key and every section, dotted."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _section_type(field.annotation)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _annotation(place: Sequence[str]) -> Any:
    """The type of a key; None where there is no such key."""
    model: type[BaseModel] | None = Recipe
    annotation: Any = None
    for part in place:
        field = model.model_fields.get(part) if model else None
        annotation = field.annotation if field else None
        model = _section_type(annotation)
    return annotation


def _section_type(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
