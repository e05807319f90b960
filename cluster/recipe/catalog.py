"""The recipes that ship with the package, by name."""

import re
from itertools import takewhile
from pathlib import Path

import lockstep

SHIPPED = Path(lockstep.__file__).parent / "recipes"
"""Their folder."""


def shipped_recipes() -> dict[str, Path]:
    """Their files by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def title(path: Path) -> str:
    """What a recipe says of itself: the first words of its comment, up to a colon or a full stop."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"[.:;](?= |$)", comment, maxsplit=1)[0]
