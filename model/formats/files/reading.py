"""Reads text and JSON of a stranger's checkpoint; whatever is wrong inside of a file becomes one sentence about it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lockstep.data.json_text import written_key
from lockstep.model.formats.files.extents import BadFile

_OF_ANOTHER_SHAPE = (
    AttributeError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
)
"""What Python raises on data that are not of the shape that a format says; sentences of ours are none of these."""


@contextmanager
def reading(what: object, described: str = "is damaged, or not laid out as its format says") -> Iterator[None]:
    """Turn what Python and pydantic raise on malformed data into one sentence about the file.

    Args:
        described: what is said of the file.

    Raises:
        BadFile: in the place of errors that are no sentences.
    """
    try:
        yield
    except ValidationError as error:
        raise BadFile(f"{what} {described}: {_first_fault(error)}") from error
    except _OF_ANOTHER_SHAPE as error:
        said = " ".join(str(error).split())[:80]
        raise BadFile(f"{what} {described} ({type(error).__name__}: {said})") from error


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    reason = str(first.get("ctx", {}).get("error", ""))
    return reason or f"{written_key(first['loc'])}: {first['msg']}"


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        BadFile: when it is none.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is no text in UTF-8: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        BadFile: when it is none.
    """
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadFile(f"{path} holds no JSON object")
    return found
