"""Puts together the code that travels with a job: this package, and modules of the user's that a recipe names.

Code alone, by the endings of files: what lies beside it, such as data or a `.env`, stays.
"""

import ast
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import lockstep
from lockstep.cluster.recipe.schema import Recipe

CODE = (".py", ".pyi", ".so", ".c", ".j2", ".sh", ".toml", ".typed")
"""How names of files end that travel."""
LARGEST_BYTES = 100 << 20
"""Ray's dashboard refuses more in one package."""


class BadModule(ValueError):
    """A module that is no Python."""


class TooLarge(ValueError):
    """More code than a Ray head takes."""


def copy_package(folder: Path) -> Path:
    """Copy this package's code into a folder; returns its place there."""
    return _copy(Path(lockstep.__file__).parent, folder / "lockstep")


def copy_modules(names: Iterable[str], folder: Path, search: Sequence[str]) -> list[str]:
    """Copy modules by their top-level names, with those beside them that they import; returns names not found.

    What is installed, by `pip` for example, does not travel.

    Args:
        search: folders in which modules are looked for, as `sys.path`.

    Raises:
        BadModule: when one is no Python.
    """
    missing = []
    for name in names:
        spec = PathFinder.find_spec(name, search)
        if spec is None:
            missing.append(name)
        elif not (folder / name).exists() and not (folder / f"{name}.py").exists() and (source := _own_source(spec)):
            copied = _copy(source, folder / source.name)
            copy_modules(_imports(copied), folder, [str(source.parent)])
    return missing


def named_modules(recipe: Recipe) -> list[str]:
    """Top-level names of the modules that a recipe names."""
    return [recipe.environment.kind.partition(":")[0].partition(".")[0]] if recipe.environment.is_own else []


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


def _copy(source: Path, target: Path) -> Path:
    """Copy a file, or the code of a folder; links are followed."""
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return target
    for root, folders, files in os.walk(source, followlinks=True):
        folders[:] = [each for each in folders if not each.startswith((".", "__pycache__"))]
        for name in files:
            if name.endswith(CODE) and not name.startswith("."):
                _copy(Path(root, name), target / Path(root, name).relative_to(source))
    return target


def _own_source(spec: ModuleSpec) -> Path | None:
    """The file or folder of a module, unless it is installed or part of Python, or is this package."""
    places = list(spec.submodule_search_locations or [spec.origin or ""])
    source = Path(places[0])
    installed = [Path(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    if spec.name == "lockstep" or not source.is_absolute() or any(each in source.parents for each in installed):
        return None
    return source


def _imports(copied: Path) -> Iterator[str]:
    """Top-level names that a module imports, by its source."""
    for path in [copied] if copied.is_file() else copied.rglob("*.py"):
        if path.suffix != ".py":
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            raise BadModule(f"{path.name}, which would travel with the job, is no Python ({error}): mend it") from error
        for node in ast.walk(tree):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            yield from (name.partition(".")[0] for name in names if name)
