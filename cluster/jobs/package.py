"""Puts together the code that travels with a job: this package, and modules of the user's that a recipe names.

Code alone, by the endings of files: what lies beside it, such as data or a `.env`, stays.
"""

import shutil
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import lockstep
from lockstep.cluster.own_modules import BadModule, code_files, own_modules
from lockstep.cluster.recipe.paths import functions, with_functions
from lockstep.cluster.recipe.schema import Recipe
from lockstep.data.tasks.user_function import parse

LARGEST_BYTES = 100 << 20
"""Ray's dashboard refuses more in one package."""


class TooLarge(ValueError):
    """More code than a Ray head takes."""


def copy_package(folder: Path) -> Path:
    """Copy this package's code into a folder; returns its place there."""
    source, target = Path(lockstep.__file__).parent, folder / "lockstep"
    for path in code_files(source):
        _copy_file(path, target / path.relative_to(source))
    return target


def copy_modules(names: Iterable[str], folder: Path, search: Sequence[str]) -> list[str]:
    """Copy modules by their top-level names, with those beside them that they import; returns names not found.

    What is installed, by `pip` for example, does not travel.

    Args:
        search: folders in which modules are looked for, as `sys.path`.

    Raises:
        BadModule: when one is no Python.
    """
    files, missing = own_modules(names, search)
    for target, source in files.items():
        _copy_file(source, folder / target)
    return missing


def copy_functions(recipe: Recipe, folder: Path, search: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Copy the modules and files of the functions that a recipe names.

    Args:
        search: as for `copy_modules`.

    Returns:
        The recipe, in which functions of files are those of modules, `file:function` for `file.py:function`; and the
        names of modules that are not found.

    Raises:
        BadModule: when one is no Python, or a file has the name of another module.
    """
    missing = list[str]()
    for text in dict(functions(recipe)).values():
        name = parse(text)
        if name.is_file:
            _check_name(Path(name.place), folder)
        top, where = name.top_level(search)
        found = copy_modules([top], folder, where)
        missing += [] if name.is_file else found
    return with_functions(recipe, _as_module), missing


def _check_name(path: Path, folder: Path) -> None:
    """Whether a file can travel as a module of its own name."""
    found, copied = PathFinder.find_spec(path.stem, sys.path), folder / path.name
    taken = path.stem in sys.stdlib_module_names or (found and Path(found.origin or "").resolve() != path.resolve())
    other = copied.exists() and copied.read_bytes() != path.read_bytes()
    if taken or other or not path.stem.isidentifier():
        raise BadModule(f"{path} would travel with the job as the module {path.stem}, another has that name: rename it")


def _as_module(text: str) -> str:
    name = parse(text)
    return f"{name.top_level(())[0]}:{name.function}" if name.is_file else text


def check_size(folder: Path, largest: int = LARGEST_BYTES) -> None:
    """Whether a Ray head takes what lies in a folder.

    Raises:
        TooLarge: names the largest files, and says what to do.
    """
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if (total := sum(sizes.values())) <= largest:
        return
    first = sorted(sizes, key=lambda path: -sizes[path])[:3]
    said = ", ".join(f"{path.relative_to(folder)} ({sizes[path] / 2**20:.0f} MiB)" for path in first)
    raise TooLarge(
        f"the code that would travel has {total / 2**20:.0f} MiB, and a Ray head takes {largest / 2**20:.0f}: the "
        f"largest are {said}; install such modules on the cluster's nodes, where they need not travel"
    )


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
