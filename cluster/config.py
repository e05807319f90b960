"""A recipe: one TOML file, composed of the configurations that stand beside the code they configure.

Any key can be overridden as `section.key=value`. What is wrong is said in one sentence that names the key, what was
given, what is allowed and the nearest valid key.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lockstep.data.problems import TaskConfig
from lockstep.distributed.layout import Layout
from lockstep.rl.recipes import RLConfig, SupervisedConfig


class RecipeError(ValueError):
    """A recipe that cannot run, in one sentence."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceConfig(_Section):
    """The model to start from, and the dtype to compute in."""

    source: str = Field(
        "smollm2-135m-instruct", description="a checkpoint, a Hugging Face folder or Hub name, or a .gguf file"
    )
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class TrainerConfig(_Section):
    """How the trainer's processes work."""

    row_tokens: int = Field(2048, ge=1, description="tokens of a packed row, which is the micro-batch")


class RolloutConfig(_Section):
    """The rollout workers."""

    workers: int = Field(2, ge=1)
    slots: int = Field(64, ge=1, description="sequences that one worker runs at the same time")
    length: int = Field(512, ge=2, description="tokens of the longest prompt and completion together")


class VerifierConfig(_Section):
    """The verifier workers."""

    workers: int = Field(1, ge=1)
    processes: int = Field(1, ge=1, description="grading processes of each worker")
    deadline: float = Field(2.0, gt=0, description="seconds that one answer may take")


class Recipe(_Section):
    """Everything that a run depends on."""

    name: str = "run"
    seed: int = Field(0, ge=0)
    run: str = Field("runs/{name}", description="the folder that the run leaves; {name} stands for the recipe's name")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints; 0 saves one at the end")
    model: SourceConfig = SourceConfig()
    task: TaskConfig = TaskConfig()
    layout: Layout = Layout()
    trainer: TrainerConfig = TrainerConfig()
    rollout: RolloutConfig = RolloutConfig()
    verifier: VerifierConfig = VerifierConfig()
    supervised: SupervisedConfig | None = None
    rl: RLConfig | None = None

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        return Path(self.run.format(name=self.name))


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
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply(values, override)
    return parse(values)


def parse(values: dict[str, Any]) -> Recipe:
    """A recipe from plain values.

    Raises:
        RecipeError: one sentence on the first thing that is wrong.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_sentence(error.errors(include_url=False)[0])) from error


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _apply(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise RecipeError(f"--set {override!r} is not of the form section.key=value, for example --set rl.group_size=8")
    *sections, last = name.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override!r}: {section} is a value, not a section")
    values[last] = _value(text.strip())


def _value(text: str) -> Any:
    """TOML where it parses, else the text itself, so that strings need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentence(error: Any) -> str:
    place = [str(part) for part in error["loc"]]
    key = ".".join(place)
    if error["type"] == "extra_forbidden":
        return f"{key} is not a key of this recipe{_nearest(place)}"
    given = json.dumps(error.get("input"), default=str)
    reason = str(error.get("ctx", {}).get("error", "")) or error["msg"][0].lower() + error["msg"][1:]
    return f"{key}={given} is not allowed: {reason}" if place else reason


def _nearest(place: list[str]) -> str:
    known = list(_keys(Recipe))
    wanted = ".".join(place)
    matches = difflib.get_close_matches(wanted, known, n=1, cutoff=0.0)
    same_end = [k for k in known if k.split(".")[-1] == place[-1]]
    best = (same_end or matches)[0]
    siblings = [k for k in known if k.rsplit(".", 1)[:-1] == place[:-1] or (len(place) == 1 and "." not in k)]
    return f"; the nearest is {best}" + (f", and keys here are {', '.join(siblings)}" if siblings else "")


def _keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        inner = _section_type(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from _keys(inner, f"{prefix}{name}.")


def _section_type(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
