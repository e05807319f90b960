"""Turns validation errors of a recipe into one sentence that names the nearest valid key."""

import difflib
import itertools
import json
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError

from lockstep.cluster.recipe.keys import dotted_keys, is_mapping, section_type
from lockstep.data.json_text import written_key


class RecipeError(ValueError):
    """A recipe that cannot run; the message is one sentence."""


def validation_sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """One validation error as one sentence: the key, what was given, what is allowed. A misspelt key comes first."""
    errors = error.errors(include_url=False)
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    place = _place(first["loc"], model, is_key=first["type"] == "extra_forbidden")
    key, names = written_key(place), [part for part in place if isinstance(part, str)]
    if first["type"] == "extra_forbidden":
        return unknown_key(place, model)
    if first["type"] == "missing":
        return f"{key} is missing: keys here are {', '.join(_siblings(names, model))}"
    reason = str(first.get("ctx", {}).get("error", "")) or first["msg"][0].lower() + first["msg"][1:]
    if first["type"] in ("model_type", "model_attributes_type"):
        reason = f"it is a section with the keys {', '.join(_siblings([*names, ''], model))}"
    return f"{key}={json.dumps(first['input'], default=str)} is not allowed: {reason}" if place else reason


def unknown_key(place: Sequence[str | int], model: type[BaseModel]) -> str:
    """A sentence on a key that nobody knows, with the one that was probably meant."""
    names = [part for part in place if isinstance(part, str)]
    return f"{written_key(place)} is not a key of this recipe{_nearest(names, model)}"


def _place(loc: Sequence[str | int], model: type[BaseModel], *, is_key: bool) -> list[str | int]:
    """The parts of a key, without what pydantic adds to say as which of several types a value was read.

    Args:
        is_key: whether the last part is a key that nobody knows.
    """
    place, section, within = list[str | int](), section_type(model), False
    for number, part in enumerate(loc):
        field = section.model_fields.get(part) if section and isinstance(part, str) else None
        if field or isinstance(part, int) or (within and part != "[key]") or (is_key and number == len(loc) - 1):
            place.append(part)
        if field:
            section, within = section_type(field.annotation), is_mapping(field.annotation)
    return place


def _nearest(place: Sequence[str], model: type[BaseModel]) -> str:
    """The key that was probably meant: the fewest edits of its last part, then the longest way in common."""

    def distance(key: str) -> tuple[int, int, int, float]:
        parts = key.split(".")
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(parts, place, strict=False)))
        likeness = difflib.SequenceMatcher(None, parts[-1], place[-1]).ratio()
        return _edits(parts[-1], place[-1]), -common, abs(len(parts) - len(place)), -likeness

    siblings = _siblings(place, model)
    return f"; the nearest is {min(dotted_keys(model), key=distance)}" + (
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
    return [key for key in dotted_keys(model) if key.split(".")[:-1] == list(place[:-1])]
