r"""Reads LaTeX's cases: as a list where they are a system of equations, as pieces where each has a condition."""

import re

_CASES = re.compile(
    r"(?:[^=\\&]{1,30}=\s*)?"
    r"(?:\\begin\{[dr]?cases\}(?P<cases>.*?)\\end\{[dr]?cases\}"
    r"|(?:\\\{\s*\\begin\{array\}\{[lcr| ]*\}|(?:\\\{\s*)?\\begin\{(?:aligned|align\*?|gathered)\})"
    r"(?P<rows>.*?)\\end\{(?:array|aligned|align\*?|gathered)\})[\s.]*",
    re.DOTALL,
)
_ROW = re.compile(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])")
_WORDS = re.compile(r"\s*(?:if|for|when|where|provided that|provided)(?![a-zA-Z])\s*", re.IGNORECASE)
_IS = re.compile(r"\s+is(?:\s+an?)?(?![a-zA-Z])\s*")
_ELSE = re.compile(r"\s*(?:otherwise|else|elsewhere|in all other cases|all other \w+)\s*", re.IGNORECASE)

OTHERWISE = "otherwise"
Pieces = tuple[tuple[str, str], ...]
"""Value and condition of each piece of a function."""


def pieces_of(text: str) -> Pieces:
    """The pieces of clean text that is a function by cases; () for any other text, and for a system."""
    rows = _rows(text)
    return tuple(rows) if rows and all(condition for _, condition in rows) else ()


def as_list(text: str) -> str:
    """Clean text, and of a system of equations the list of them."""
    rows = _rows(text)
    return ", ".join(value for value, _ in rows) if rows and not any(condition for _, condition in rows) else text


def _rows(text: str) -> list[tuple[str, str]]:
    match = _CASES.fullmatch(text)
    if not match:
        return []
    return [_cells(row) for row in _ROW.split(match["cases"] or match["rows"] or "") if row.strip(" .,;&")]


def _cells(row: str) -> tuple[str, str]:
    value, ampersand, condition = row.partition("&")
    if ampersand and re.match(r"\s*=", condition):  # an aligned equation
        return row.replace("&", "").strip(" .,;"), ""
    if not ampersand:
        value, *rest = re.split(r"(?<![a-zA-Z])(?:if|for|when)(?![a-zA-Z])", row, maxsplit=1)
        condition = rest[0] if rest else ""
    condition = _IS.sub(" ", _WORDS.sub("", condition.replace("&", " "), count=1)).strip(" .,;")
    return value.strip(" .,;"), OTHERWISE if _ELSE.fullmatch(condition) else condition
