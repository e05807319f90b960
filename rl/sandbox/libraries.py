"""Libraries that programs and tests may import beside Python's own: installed distributions, with what they need.

Their files are read where they lie. An import finder serves these names alone, so that nothing else of the same
`site-packages` can be imported, whether or not namespaces hide it.
"""

import importlib
import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType

from lockstep.rl.sandbox.isolation import SandboxError

DEFAULT = ("numpy",)
"""HumanEval+ and MBPP+ import it in every test."""
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Environment in which libraries start no threads: a zygote has none, and each would take memory of a program's."""


class LibraryError(SandboxError):
    """A library that programs are to have is not installed."""


def located(names: Iterable[str]) -> tuple[str, ...]:
    """Files and folders of these distributions, and of what they require and is installed, as absolute paths.

    Raises:
        LibraryError: for one that is not installed.
    """
    found: dict[str, None] = {}
    waiting, seen = list(names), set[str]()
    for name in waiting:
        distribution = _distribution(name)
        if distribution is None:
            raise LibraryError(
                f"programs are to have {name!r}, which is not installed here: install it, or leave it out"
            )
        if (key := name.lower().replace("_", "-")) in seen:
            continue
        seen.add(key)
        found |= dict.fromkeys(_top_level(distribution))
        needed = [re.match(r"[\w.-]+", line) for line in distribution.requires or () if "extra ==" not in line]
        waiting += [one[0] for one in needed if one and _distribution(one[0])]
    return tuple(found)


def _distribution(name: str) -> metadata.Distribution | None:
    with suppress(metadata.PackageNotFoundError, ValueError):
        return metadata.distribution(name)
    return None


def _top_level(distribution: metadata.Distribution) -> list[str]:
    """What lies in `site-packages` itself: packages, modules, and folders of shared libraries."""
    tops = dict.fromkeys(
        file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")
    )
    paths = [Path(str(distribution.locate_file(top))).absolute() for top in tops if not top.endswith(".dist-info")]
    return [str(path) for path in paths if path.suffix not in (".pth", ".virtualenv") and path.exists()]


class LibraryFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of some files and folders, and nothing that lies beside them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._folders = {_module_name(path): str(Path(path).parent) for path in paths}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As `importlib` asks; a part of a package is found by the package's own path."""
        folder = self._folders.get(fullname)
        return importlib.machinery.PathFinder.find_spec(fullname, [folder], target) if folder else None


def _module_name(path: str) -> str:
    return Path(path).name.partition(".")[0]


def mentioned(text: str, paths: Iterable[str]) -> list[str]:
    """Names of those libraries that a source seems to import, be it as it is or as text in JSON."""
    found = set(re.findall(r"(?:\b|\\[nrt])(?:import|from)\s+([A-Za-z_]\w*)", text))
    return sorted(found & {_module_name(path) for path in paths})


def warm(names: Iterable[str]) -> None:
    """Imports libraries before the forks of processes that want them; one that cannot be imported fails there."""
    for name in names:
        if name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)
