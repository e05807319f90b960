"""Finds the files of modules that are the user's own, with those beside them that they import, by their source."""

import ast
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

CODE = (".py", ".pyi", ".so", ".c", ".j2", ".sh", ".toml", ".typed")
"""How names of files end that belong to a module; data beside them, or a `.env`, do not."""


class BadModule(ValueError):
    """A module that is no Python, or whose name is taken."""


def own_modules(names: Iterable[str], search: Sequence[str]) -> tuple[dict[Path, Path], list[str]]:
    """Files of modules, by top-level names, and of those beside them that they import.

    What is installed, by `pip` for example, and this package are left out.

    Args:
        search: folders in which modules are looked for, as `sys.path`.

    Returns:
        Each file by its path from a folder that could be searched for modules; and names that were not found.

    Raises:
        BadModule: when one is no Python.
    """
    files = dict[Path, Path]()
    missing = [name for name in names if not _found(name, search, files)]
    return files, missing


def code_files(source: Path) -> Iterator[Path]:
    """A file, or the files of code in a folder; links are followed."""
    if source.is_file():
        yield source
        return
    for root, folders, names in os.walk(source, followlinks=True):
        folders[:] = sorted(each for each in folders if not each.startswith((".", "__pycache__")))
        yield from (Path(root, name) for name in sorted(names) if name.endswith(CODE) and not name.startswith("."))


def _found(name: str, search: Sequence[str], files: dict[Path, Path]) -> bool:
    """Whether there is a module of this name; adds its files, and those of modules that it imports."""
    spec = PathFinder.find_spec(name, search)
    source = spec and _own_source(spec)
    if source and not any(path.parts[0] == source.name for path in files):
        found = {path.relative_to(source.parent): path for path in code_files(source)}
        files |= found
        for imported in dict.fromkeys(each for path in found.values() for each in _imports(path)):
            _found(imported, [str(source.parent)], files)
    return spec is not None


def _own_source(spec: ModuleSpec) -> Path | None:
    """The file or folder of a module, unless it is installed or part of Python, or is this package."""
    places = list(spec.submodule_search_locations or [spec.origin or ""])
    source = Path(places[0])
    installed = [Path(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    if spec.name == "lockstep" or not source.is_absolute() or any(each in source.parents for each in installed):
        return None
    return source


def _imports(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, by its source."""
    if path.suffix != ".py":
        return
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise BadModule(f"{path.name}, which would travel with the job, is no Python ({error}): mend it") from error
    for node in ast.walk(tree):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (name.partition(".")[0] for name in names if name)
