r"""Boxes around final answers, as LaTeX writes them: `\boxed{…}` and `\fbox{…}`, braces in them balanced."""

import re
from collections.abc import Iterator

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def boxes(text: str) -> Iterator[tuple[int, int, int]]:
    """Where each closed box begins, and start and end of what it holds, in one pass; escaped braces do not count."""
    opened: list[tuple[int | None, int]] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "}" and opened:
            begin, start = opened.pop()
            if begin is not None:
                yield begin, start, token.start()
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append((token.start() if token[0] != "{" else None, token.end()))


def last_box(text: str) -> tuple[int, int] | None:
    """Start and end of what the last box holds that closes and holds something; of nested ones it is the inner one."""
    return max(((start, end) for _, start, end in boxes(text) if text[start:end].strip()), default=None)


def last_boxed(text: str) -> str | None:
    """What `last_box` finds; None where there is none."""
    found = last_box(text)
    return found and text[slice(*found)].strip()
