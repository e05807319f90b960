"""Paths in recipes: which fields hold one, and what a relative one means.

`Annotated[str, Path]` is the type of a path or a URL, `Annotated[str, Path | str]` that of a path, a URL or a name (of
a model on the Hub or in a package, of a generator). Relative paths mean the folder in which the command is given,
whatever the folders are in which workers and jobs run.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lockstep.cluster.recipe.schema import Recipe
from lockstep.data.row_reader import SUFFIXES
from lockstep.distributed.checkpoint.storage import is_url

FILES = (".gguf", *SUFFIXES)
"""How names of files end, which are no names of anything else."""
_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_Section = TypeVar("_Section", bound=BaseModel)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its relative paths made absolute, `run` with its name in it; names and URLs stay as they are."""
    return _in_section(recipe.model_copy(update={"run": str(recipe.folder)}))


def is_path(field: FieldInfo) -> bool:
    """Whether a field of a recipe is marked as a path or a URL."""
    return Path in _marks(field)


def is_path_or_name(field: FieldInfo) -> bool:
    """Whether a field of a recipe is marked as a path, a URL or a name."""
    return (Path | str) in _marks(field)


def _marks(field: FieldInfo) -> list[Any]:
    within = (mark for part in get_args(field.annotation) for mark in getattr(part, "__metadata__", ()))
    return [*field.metadata, *within]


def _in_section(section: _Section) -> _Section:
    changed = {
        name: new
        for name, field in type(section).model_fields.items()
        if (new := _in_value(old := getattr(section, name), field)) != old
    }
    return section.model_copy(update=changed) if changed else section


def _in_value(value: Any, field: FieldInfo) -> Any:
    if isinstance(value, BaseModel):
        return _in_section(value)
    if isinstance(value, tuple):
        return tuple(_in_value(each, field) for each in value)
    if isinstance(value, str) and is_path(field):
        return _absolute(value, lambda _: False)
    if isinstance(value, str) and is_path_or_name(field):
        return _absolute(value, _is_name)
    return value


def _absolute(text: str, is_name: Callable[[str], bool]) -> str:
    """The absolute path; a link at its end, such as `latest`, is not followed."""
    if not text or is_url(text.replace("{name}", "")) or is_name(text):
        return text
    path = Path(text)
    return str(path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name)


def _is_name(text: str) -> bool:
    """Whether a text names something else than a file or folder: none is there, and it does not look like one."""
    return bool(_NAME.fullmatch(text)) and not text.endswith(FILES) and not Path(text).exists()
