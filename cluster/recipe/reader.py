"""Reads a recipe's file, by its path or by the name of one that ships with the package, on top of those it extends.

Tables of a recipe are merged with those of the recipes that it `extends`; any other value takes the place of theirs.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.cluster.recipe.catalog import SHIPPED, shipped_recipes
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.paths import with_paths_from

DEEPEST = 8
"""How many recipes may stand on top of each other."""


def read_recipe(given: Path | str) -> dict[str, Any]:
    """The values of a recipe, with those of the recipes that it extends.

    Args:
        given: a path; a name without a folder and an ending, where no file has it, is that of a recipe that ships.

    Raises:
        RecipeError: one sentence on what cannot be read.
    """
    path = _find(str(given), Path())
    if path is None:
        raise RecipeError(f"there is no recipe {given}: give the path of a .toml file, or {_known()}")
    return _read(path, ())


def read_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe that is no file, with those of the recipes that it extends, from the current folder.

    Raises:
        RecipeError: as `read_recipe`.
    """
    return _on_top(values, Path("the recipe"), ())


def _find(name: str, folder: Path) -> Path | None:
    """The recipe of this path from a folder, or of this name among those that ship."""
    path = folder / name
    return path if path.is_file() else shipped_recipes().get(name)


def _known() -> str:
    return f"the name of one that ships with the package: {', '.join(shipped_recipes())}"


def _read(path: Path, above: Sequence[Path]) -> dict[str, Any]:
    """The values of a recipe that those `above` extend, the first one first."""
    chain = (*above, path)
    if path.resolve() in [each.resolve() for each in above]:
        raise RecipeError(f"recipes extend each other in a circle, {_said(chain)}: let one of them stand alone")
    if len(chain) > DEEPEST:
        raise RecipeError(f"more than {DEEPEST} recipes stand on top of each other, {_said(chain)}: merge some of them")
    values = _parse(path)
    own = with_paths_from(path.absolute().parent, values) if above and not _is_shipped(path) else values
    return _on_top(own, path, above)


def _on_top(values: Mapping[str, Any], path: Path, above: Sequence[Path]) -> dict[str, Any]:
    """The values of the recipe `path` on top of those of the recipes that it extends."""
    below: dict[str, Any] = {}
    for name in _extended(values.get("extends", []), path):
        below = merged(below, _read(_below(name, path), (*above, path)))
    return merged(below, {name: value for name, value in values.items() if name != "extends"})


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Values with others on top of them: tables are merged, anything else is replaced."""
    found = dict(below)
    for name, value in above.items():
        old = found.get(name)
        found[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}): give a recipe that can") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error


def _extended(given: Any, path: Path) -> list[str]:
    names: list[Any] = given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) and name for name in names):
        raise RecipeError(f"{path} says extends={given!r}: give the path of a recipe, or a list of paths")
    return names


def _below(name: str, path: Path) -> Path:
    """The recipe that another one extends."""
    found = _find(name, path.parent)
    if found is None:
        raise RecipeError(f"{path} extends {name}, and there is none: give a path from its folder, or {_known()}")
    return found


def _is_shipped(path: Path) -> bool:
    """Whether its paths are of the folder in which the command is given, whoever extends it."""
    return path.resolve().parent == SHIPPED.resolve()


def _said(chain: Sequence[Path]) -> str:
    return " → ".join(map(str, chain))
