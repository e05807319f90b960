"""Compares what a program prints or returns with what is expected: decimals by value within 1e-6, all else exactly."""

import ast
import math
import re
from contextlib import suppress
from decimal import Decimal
from typing import Any

_ABSOLUTE, _RELATIVE = 1e-6, 1e-9
_SEPARATORS = re.compile(r"([\[\](),;:])")
_NUMBER = re.compile(r"[+-]?(?:\d+(\.\d*)?|(\.\d+))([eE][+-]?\d+)?")
_HAS_DECIMALS = re.compile(r"\d\.|\.\d|\d[eE]-?\d|/")
"""Where a source has none of these, it expects no decimals."""
CLOSE = "@close"
"""The name of `close` for tests, which no source can spell."""


def same_output(printed: str, expected: str) -> bool:
    """Whether outputs are equal by lines, up to space around words and at the end, decimals by value (1.0 = 1.00)."""
    ours, theirs = (text.rstrip().split("\n") for text in (printed, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(ours: str, theirs: str) -> bool:
    one, other = ours.split(), theirs.split()
    return one == other or (len(one) == len(other) and all(map(_same_word, one, other)))


def _same_word(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    one, other = _SEPARATORS.split(ours), _SEPARATORS.split(theirs)
    return len(one) == len(other) and all(map(_same_part, one, other))


def _same_part(ours: str, theirs: str) -> bool:
    """Where a decimal is expected any number may come, where an integer or a text is expected the same one alone."""
    if ours == theirs:
        return True
    expected = _NUMBER.fullmatch(theirs)
    if not expected or not any(expected.groups()) or not _NUMBER.fullmatch(ours):
        return False
    one, other = Decimal(ours), Decimal(theirs)
    with suppress(ArithmeticError):  # beyond the exponents that decimals are computed with
        return one == other or abs(one - other) <= max(Decimal("1e-6"), abs(other) * Decimal("1e-9"))
    return False


def close(ours: Any, theirs: Any) -> Any:
    """What `ours == theirs` gives; but floats in lists, tuples and dicts, or on their own, are equal within 1e-6."""
    same = ours == theirs
    if isinstance(same, bool) and not same and type(ours) is type(theirs):
        return _near(ours, theirs)
    return same


def _near(ours: Any, theirs: Any) -> bool:
    if type(ours) is not type(theirs):
        return bool(ours == theirs)
    if type(ours) is float:
        return ours == theirs or math.isclose(ours, theirs, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
    if type(ours) in (list, tuple):
        return len(ours) == len(theirs) and all(map(_near, ours, theirs))
    if type(ours) is dict:
        return ours.keys() == theirs.keys() and all(_near(ours[key], theirs[key]) for key in theirs)
    return bool(ours == theirs)


class _Tolerant(ast.NodeTransformer):
    """Turns `a == b` into `close(a, b)`."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        match node.ops:
            case [ast.Eq()]:
                called = ast.Name(CLOSE, ast.Load())
                return ast.Call(called, [node.left, *node.comparators], [])
        return node


class _Asserts(ast.NodeTransformer):
    """Changes assertions alone, so that what tests compute is computed as ever."""

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        node.test = _Tolerant().visit(node.test)
        return node


def with_tolerance(source: str) -> ast.Module | str:
    """Tests whose assertions compare by `close`, which they need under the name `CLOSE`.

    Raises:
        SyntaxError: as `compile` does, and the other errors that it raises.
    """
    if not _HAS_DECIMALS.search(source):
        return source
    return ast.fix_missing_locations(_Asserts().visit(ast.parse(source)))
