r"""Finds `\boxed{…}` and `\fbox{…}` in LaTeX, with balanced braces, and boxes without braces, as in `\boxed 5`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_UNBRACED = (
    rf"[-+]?(?:[0-9](?:[0-9.,/]*[0-9])?|[a-zA-Z](?![a-zA-Z])|\\[a-zA-Z]+(?:\[[^\[\]]*\])?(?:\s*{_GROUP})*|\\?%"
    rf"|[(\[][^()\[\]$\n]*[)\]]|\\\{{[^{{}}$\n]*\\\}}|[\^_](?:{_GROUP}|[0-9a-zA-Z]))+"
)
_TOKEN = re.compile(
    r"\\(?:boxed|fbox)(?:\s*(?P<brace>\{)|(?![a-zA-Z])\s*\$?\s*" + rf"(?P<bare>{_UNBRACED}))" + r"|\\.|[{}]", re.DOTALL
)


@dataclass(frozen=True, order=True)
class Box:
    """Positions in a text: from `begin` to `end` the whole box, from `start` to `stop` what it holds."""

    start: int
    stop: int
    begin: int
    end: int


def boxes(text: str) -> Iterator[Box]:
    """Each closed box of a text, an inner one before its outer one; escaped braces are ignored."""
    opened: list[tuple[int | None, int]] = []
    for token in _TOKEN.finditer(text):
        if token[0] == "}" and opened:
            begin, start = opened.pop()
            if begin is not None:
                yield Box(start, token.start(), begin, token.end())
        elif token["bare"]:
            yield Box(*token.span("bare"), *token.span())
        elif token["brace"] or token[0] == "{":
            opened.append((token.start() if token["brace"] else None, token.end()))


def last_box(text: str) -> Box | None:
    """The last closed box that is not empty; of nested ones the inner one."""
    return max((box for box in boxes(text) if text[box.start : box.stop].strip()), default=None)


def last_boxed(text: str) -> str | None:
    """The text of the last box, stripped, or None; see `last_box`."""
    found = last_box(text)
    return text[found.start : found.stop].strip() if found else None
