"""Paths and functions in recipes: which fields hold one, and what a relative path means.

`Annotated[str, Path]` is the type of a path or a URL, `Annotated[str, Path | str]` that of a path, a URL or a name (of
a model on the Hub or in a package, of a generator). `Callable` beside them, or alone, marks what may be a function of
the user's, as `module:function` or `file.py:function`. Relative paths mean the folder in which the command is given,
whatever the folders are in which workers and jobs run.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lockstep.cluster.recipe.keys import section_type
from lockstep.cluster.recipe.schema import Recipe
from lockstep.data.row_reader import SUFFIXES
from lockstep.data.tasks.user_function import function_name
from lockstep.distributed.checkpoint.storage import is_url

FILES = (".gguf", *SUFFIXES)
"""How names of files end, which are no names of anything else."""
WRITTEN = ("run", "checkpoints.at")
"""Keys of paths that a run writes to."""
_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_Section = TypeVar("_Section", bound=BaseModel)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its relative paths made absolute, `run` with its name in it; names and URLs stay as they are."""
    return _in_section(recipe.model_copy(update={"run": str(recipe.folder)}), lambda text, f: _in_text(text, f, Path()))


def with_functions(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    """The recipe with the names of its functions changed."""
    return _in_section(recipe, lambda text, field: change(text) if _names_function(text, field) else text)


def functions(section: BaseModel) -> Iterator[tuple[str, str]]:
    """Keys and names of the functions in a recipe or a section."""
    return ((key, text) for key, text, field in _texts(section) if _names_function(text, field))


def with_paths_from(folder: Path, values: Mapping[str, Any], model: type[BaseModel] = Recipe) -> dict[str, Any]:
    """The values of a recipe's file, or of a section, with paths from a folder made absolute; what is wrong stays."""
    return {
        name: _from(folder, value, model.model_fields[name]) if name in model.model_fields else value
        for name, value in values.items()
    }


def _from(folder: Path, value: Any, field: FieldInfo) -> Any:
    section = section_type(field.annotation)
    if isinstance(value, dict) and section:
        return with_paths_from(folder, value, section)
    if isinstance(value, list):
        return [_from(folder, each, field) for each in value]
    return _in_text(value, field, folder) if isinstance(value, str) else value


def is_path(field: FieldInfo) -> bool:
    """Whether a field of a recipe is marked as a path or a URL."""
    return Path in _marks(field)


def is_path_or_name(field: FieldInfo) -> bool:
    """Whether a field of a recipe is marked as a path, a URL or a name."""
    return (Path | str) in _marks(field)


def is_function(field: FieldInfo) -> bool:
    """Whether a field of a recipe is marked as one that may name a function."""
    return Callable in _marks(field)


def _names_function(text: str, field: FieldInfo) -> bool:
    return is_function(field) and function_name(text) is not None


def _marks(field: FieldInfo) -> list[Any]:
    within = (mark for part in get_args(field.annotation) for mark in getattr(part, "__metadata__", ()))
    return [*field.metadata, *within]


def _in_section(section: _Section, change: Callable[[str, FieldInfo], str]) -> _Section:
    """A section whose texts are changed, those of sections and tuples inside of it as well."""
    changed = {
        name: new
        for name, field in type(section).model_fields.items()
        if (new := _in_value(old := getattr(section, name), field, change)) != old
    }
    return section.model_copy(update=changed) if changed else section


def _in_value(value: Any, field: FieldInfo, change: Callable[[str, FieldInfo], str]) -> Any:
    if isinstance(value, BaseModel):
        return _in_section(value, change)
    if isinstance(value, tuple):
        return tuple(_in_value(each, field, change) for each in value)
    return change(value, field) if isinstance(value, str) else value


def _in_text(text: str, field: FieldInfo, folder: Path) -> str:
    """A field's text, absolute where it is a path; a link at its end, such as `latest`, is not followed."""
    if is_function(field) and (function := function_name(text)):
        return f"{_absolute(function.place, folder)}:{function.function}" if function.is_file else text
    named = is_path_or_name(field)
    if not (named or is_path(field)) or not text or is_url(text.replace("{name}", "")):
        return text
    return text if named and _is_name(text, folder) else _absolute(text, folder)


def _absolute(text: str, folder: Path) -> str:
    path = folder / text
    return str(path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name)


def _is_name(text: str, folder: Path) -> bool:
    """Whether a text names something else than a file or folder: none is there, and it does not look like one."""
    return bool(_NAME.fullmatch(text)) and not text.endswith(FILES) and not (folder / text).exists()


def input_paths(recipe: Recipe) -> dict[str, Path]:
    """Absolute paths that a recipe reads from, by key; names, URLs and what a run writes are left out."""
    return {key: Path(text) for key, text in absolute_paths(recipe) if key not in WRITTEN}


def absolute_paths(section: BaseModel) -> Iterator[tuple[str, str]]:
    """Keys and texts of the absolute paths in a recipe or a section; names, URLs and relative paths are left out."""
    for key, text, field in _texts(section):
        marked = is_path(field) or is_path_or_name(field)
        if marked and text.startswith("/") and not _names_function(text, field):
            yield key, text


def _texts(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, FieldInfo]]:
    """The texts in a section and in those inside of it, with their keys and fields."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        for number, each in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            key = f"{prefix}{name}" if number is None else f"{prefix}{name}[{number}]"
            if isinstance(each, BaseModel):
                yield from _texts(each, f"{key}.")
            elif isinstance(each, str):
                yield key, each, field


def missing(paths: Mapping[str, Path]) -> dict[str, Path]:
    """Those of some paths that this host does not have; a path may stand for files that add an ending to it."""
    return {key: path for key, path in paths.items() if not _is_there(path)}


def _is_there(path: Path) -> bool:
    return path.exists() or any(path.parent.glob(f"{escape(path.name)}.*"))
