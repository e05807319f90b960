r"""Finds `\boxed{…}` and `\fbox{…}` in LaTeX, with balanced braces."""

import re
from collections.abc import Iterator

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def boxes(text: str) -> Iterator[tuple[int, int, int]]:
    """The (begin of box, start of content, end of content) of each closed box; escaped braces are ignored."""
    opened: list[tuple[int | None, int]] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "}" and opened:
            begin, start = opened.pop()
            if begin is not None:
                yield begin, start, token.start()
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append((token.start() if token[0] != "{" else None, token.end()))


def last_box(text: str) -> tuple[int, int] | None:
    """Start and end of the content of the last closed box that is not empty; of nested ones the inner one."""
    return max(((start, end) for _, start, end in boxes(text) if text[start:end].strip()), default=None)


def last_boxed(text: str) -> str | None:
    """The text of the last box, stripped, or None; see `last_box`."""
    found = last_box(text)
    return found and text[slice(*found)].strip()
