r"""Reads LaTeX's cases: as a list where they are a system of equations, as pieces where each has a condition."""

import re

_CASES = re.compile(
    r"(?:[a-zA-Z]\w?(?:\([^()=]*\))?\s*=\s*)?"
    r"(?:\\begin\{[dr]?cases\}(?P<cases>.*?)\\end\{[dr]?cases\}"
    r"|\\\{\s*\\begin\{(?P<kind>array|aligned)\}(?:\{[lcr| ]*\})?(?P<rows>.*?)\\end\{(?P=kind)\})[\s.]*",
    re.DOTALL,
)
_ROW = re.compile(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])")
_WORDS = re.compile(r"\s*(?:if|for|when|where|provided that|provided)(?![a-zA-Z])\s*", re.IGNORECASE)
_ELSE = re.compile(r"\s*(?:otherwise|else|elsewhere|in all other cases|all other \w+)\s*", re.IGNORECASE)

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
        value, *rest = _WORDS.split(row, maxsplit=1)
        condition = rest[0] if rest else ""
    condition = _WORDS.sub("", condition.replace("&", " "), count=1).strip(" .,;")
    return value.strip(" .,;"), "otherwise" if _ELSE.fullmatch(condition) else condition
