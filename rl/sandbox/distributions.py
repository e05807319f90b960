"""Finds the files of installed distributions, and of what they require, to offer them to programs.

Apart from `libraries.py`, which zygotes import: `importlib.metadata` loads sixty modules, and forks would be larger.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from lockstep.rl.sandbox.isolation import SandboxError

DEFAULT = ("numpy",)
"""HumanEval+ and MBPP+ import it in every test."""


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
