"""Turns validation errors of a recipe into one sentence that names the nearest valid key."""

import difflib
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from lockstep.cluster.recipe.schema import Recipe


class RecipeError(ValueError):
    """A recipe that cannot run; the message is one sentence."""


def validation_sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """One validation error as one sentence: the key, what was given, what is allowed. A misspelt key comes first."""
    errors = error.errors(include_url=False)
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    place = _place(first["loc"], model, is_key=first["type"] == "extra_forbidden")
    key, names = _dotted(place), [part for part in place if isinstance(part, str)]
    if first["type"] == "extra_forbidden":
        return f"{key} is not a key of this recipe{_nearest(names, model)}"
    if first["type"] == "missing":
        return f"{key} is missing: keys here are {', '.join(_siblings(names, model))}"
    reason = str(first.get("ctx", {}).get("error", "")) or first["msg"][0].lower() + first["msg"][1:]
    if first["type"] in ("model_type", "model_attributes_type"):
        reason = f"it is a section with the keys {', '.join(_siblings([*names, ''], model))}"
    return f"{key}={json.dumps(first['input'], default=str)} is not allowed: {reason}" if place else reason


def _place(loc: Sequence[str | int], model: type[BaseModel], *, is_key: bool) -> list[str | int]:
    """The parts of a key, without what pydantic adds to say as which of several types a value was read.

    Args:
        is_key: whether the last part is a key that nobody knows.
    """
    place, section, within = list[str | int](), _section_type(model), False
    for number, part in enumerate(loc):
        field = section.model_fields.get(part) if section and isinstance(part, str) else None
        if field or isinstance(part, int) or (within and part != "[key]") or (is_key and number == len(loc) - 1):
            place.append(part)
        if field:
            section, within = _section_type(field.annotation), _is_mapping(field.annotation)
    return place


def _dotted(place: Iterable[str | int]) -> str:
    """A key as it is written: `pretrain.data.blend[1].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


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


def annotation(place: Sequence[str]) -> Any:
    """The type of a key of the recipe; None where there is no such key."""
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


def _is_mapping(annotation: Any) -> bool:
    """Whether the keys below are the user's own, as in `task.settings`."""
    options = (annotation, *getattr(annotation, "__args__", ()))
    return any(getattr(option, "__origin__", None) is dict for option in options)
