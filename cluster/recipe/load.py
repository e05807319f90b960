"""Loads recipes: a TOML file and `section.key=value` overrides become a checked `Recipe`."""

import copy
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from lockstep.cluster.recipe.errors import RecipeError, validation_sentence
from lockstep.cluster.recipe.keys import annotation
from lockstep.cluster.recipe.paths import with_absolute_paths
from lockstep.cluster.recipe.reader import read_recipe, read_values
from lockstep.cluster.recipe.schema import Recipe
from lockstep.data.json_text import written_key
from lockstep.distributed.layout import Layout


class BadOverride(RecipeError):
    """An override that is not of the form `section.key=value`, or whose section is none."""


def load_recipe(given: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides; its paths become absolute.

    Args:
        given: the path of a TOML file, or the name of a recipe that ships with the package.

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    return with_absolute_paths(parse(read_recipe(given), overrides))


def resolve(given: Recipe | Mapping[str, Any] | Path | str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from whatever a program has: a `Recipe`, its values, a path or the name of one that ships.

    Args:
        overrides: values by dotted key, as `{"rl.group_size": 8}`.

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    if isinstance(given, Recipe):
        values = given.model_dump(mode="json", exclude_unset=True)
    else:
        values = read_values(copy.deepcopy(given)) if isinstance(given, Mapping) else read_recipe(given)
    for key, value in (overrides or {}).items():
        _put(values, _parts(key, key), value, key)
    return with_absolute_paths(parse(values))


def parse(values: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from plain values and `key=value` overrides.

    Raises:
        RecipeError: one sentence on the first thing that is wrong.
    """
    values = copy.deepcopy(values)
    for override in overrides:
        _apply(values, override)
    for place, value in _leaves(values):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{written_key(place)}={value} is not allowed: give a finite number")
    try:
        return Recipe.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(validation_sentence(error, Recipe)) from error


def changed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with `key=value` overrides applied to it; their paths become absolute.

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    return with_absolute_paths(parse(tomllib.loads(to_toml(recipe)), overrides))


def parse_layout(text: str) -> Layout:
    """A layout from its keys, as in "tensor=2,sequence=true".

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    values: dict[str, Any] = {}
    try:
        for part in filter(None, map(str.strip, re.split(r",(?![^\[]*\])", text))):  # not at the commas of a list
            _apply(values, part)
        return Layout.model_validate_json(json.dumps(values), strict=True)
    except BadOverride as error:
        raise RecipeError(f"layout {text!r} is not of the form key=value, as in tensor=2,sequence=true") from error
    except ValidationError as error:
        raise RecipeError(f"layout {text!r}: {validation_sentence(error, Layout)}") from error


def to_toml(recipe: Recipe) -> str:
    """Serialise a recipe as TOML, with every default written out."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _apply(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    parts = _parts(name if separator else "", override)
    _put(values, parts, _value(text.strip(), wants_text=annotation(parts, Recipe) is str), override)


def _parts(name: str, override: str) -> list[str]:
    parts = [part.strip() for part in name.split(".")]
    if not all(parts):
        raise BadOverride(f"{override!r} is not of the form section.key=value, for example rl.group_size=8")
    return parts


def _put(values: dict[str, Any], parts: Sequence[str], value: Any, override: str) -> None:
    *sections, last = parts
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise BadOverride(f"{override!r}: {written_key([section])} is a value, not a section")
    values[last] = value


def _value(text: str, *, wants_text: bool) -> Any:
    """TOML where it parses, else the text itself, so that strings need no quotes."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # of TOML, or of what Python reads of it
        return text
    return text if wants_text and not isinstance(value, str) else value


def _leaves(value: Any, *place: str | int) -> Iterable[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, *place, key)
    else:
        yield place, value
