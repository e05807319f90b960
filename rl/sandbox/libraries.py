"""Imports of libraries that programs and tests may use beside Python's own, from the files and folders that they are.

An import finder serves these names alone, so that nothing else of the same `site-packages` can be imported, whether or
not namespaces hide it.
"""

import importlib
import importlib.machinery
import re
import sys
from collections.abc import Iterable, Sequence, Set
from contextlib import suppress
from pathlib import Path
from types import ModuleType

ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Environment in which libraries start no threads: a zygote has none, and each would take memory of a program's."""


class LibraryFinder:
    """A `MetaPathFinder` of the modules of some files and folders, and of nothing that lies beside them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._folders = {module_name(path): str(Path(path).parent) for path in paths}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As `importlib` asks; a part of a package is found by the package's own path."""
        folder = self._folders.get(fullname)
        return importlib.machinery.PathFinder.find_spec(fullname, [folder], target) if folder else None


def module_name(path: str) -> str:
    """The name by which a file or folder is imported."""
    return Path(path).name.partition(".")[0]


def mentioned(text: str, offered: Set[str]) -> list[str]:
    """Names of those libraries that a source seems to import, be it as it is or as text in JSON."""
    if not any(name in text for name in offered):
        return []
    found = set(re.findall(r"(?:\b|\\[nrt])(?:import|from)\s+([A-Za-z_]\w*)", text))
    return sorted(found & offered)


def warm(names: Iterable[str]) -> None:
    """Imports libraries before the forks of processes that want them; one that cannot be imported fails there."""
    for name in names:
        if name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)
