r"""Turns LaTeX into sympy expressions as school mathematics means them: odd roots are real, and i is imaginary.

sympy's own cube root of −8 is 1 + √3 i, and its parser for LaTeX takes a letter at the end of a formula for a unit
unless it is told not to.
"""

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse
from sympy import (
    Expr,
    I,
    Interval,
    MatrixBase,
    Pow,
    Rational,
    Symbol,
    Tuple,
    factorial,
    log,
    nan,
    oo,
    postorder_traversal,
    zoo,
)
from sympy.core.relational import Relational

from lockstep.rl.verifiers.math.numbers import FUNCTIONS

DIGITS = 40
_LONGEST = 1000
_MOST_DIGITS = 10_000
_DEFAULT = LatexExtractionConfig()
_LATEX = [replace(_DEFAULT, normalization_config=replace(_DEFAULT.normalization_config, units=False, boxed="none"))]
_INDEXED = re.compile(r"\\(?:sum|prod|int|lim|binom|le|ge|ne)(?![a-zA-Z])|[<>]|(?<![a-zA-Z\\])i\s*=|=\s*i\s*(?:[,;]|$)")
"""Where i may be an index or an unknown, and not the imaginary unit."""

_NEGATIVE_ROOT = re.compile(r"\\sqrt\s*\[\s*([0-9]*[13579])\s*\]\s*\{\s*-((?:[^{}+-]|\{[^{}]*\})*)\}")
"""An odd root of what begins with a minus, for which sympy refuses to make an interval."""


@lru_cache(1024)  # a group's answers share their reference, and often each other
def expression_of(formula: str | None) -> Any | None:
    r"""A formula as sympy reads its LaTeX, or None. Bare function names (sin x, pi) are taken for \sin x and \pi.

    Raises:
        ValueError: it has a number of over 10,000 digits.
    """
    if formula is None or len(formula) > _LONGEST:  # math_verify's patterns take quadratic time
        return None
    latex = re.sub(rf"(?<![\\a-zA-Z])({FUNCTIONS})(?![a-zA-Z])", r"\\\1", formula)
    found = _parsed(latex)
    if found is None and _NEGATIVE_ROOT.search(latex):
        found = _parsed(_NEGATIVE_ROOT.sub(r"(-\\sqrt[\1]{\2})", latex))
    if found is None:
        return None
    _check_size(found)
    return _real(found, Symbol("i", real=True) if _INDEXED.search(latex) else I)


def _parsed(latex: str) -> Any | None:
    parsed = parse(f"${latex}$", _LATEX, fallback_mode="no_fallback", parsing_timeout=None)
    return next((expression for expression in parsed if not expression.has(zoo, nan)), None)


def value_of(expression: Any) -> Any | None:
    """The value of a formula without variables, exact or to 40 digits; None for sets, matrices, infinities."""
    if not isinstance(expression, Expr) or expression.free_symbols or expression.has(oo, -oo):
        return None
    exact = expression.doit()
    value = exact if exact.is_Rational else exact.evalf(DIGITS)
    return value if value.is_number and all(part.is_Number for part in value.as_real_imag()) else None


def _real(node: Any, unit: Any) -> Any:
    """The expression with real variables, `unit` for i, and real odd roots; untouched parts stay unevaluated."""
    if isinstance(node, MatrixBase):
        return node.applyfunc(lambda entry: _real(entry, unit))
    if isinstance(node, Symbol):
        return unit if node.name == "i" else node if node.is_real else Symbol(node.name, real=True)
    old = getattr(node, "_unsorted_args", node.args)  # math_verify's sets remember how they were written
    new = [_real(part, unit) for part in old]
    if any(one is not other for one, other in zip(new, old, strict=True)):
        node = _rebuilt(node, new)
    return _real_root(node) if isinstance(node, Pow) else node


def _rebuilt(node: Any, args: list[Any]) -> Any:
    """The node with other arguments; what looks like an open interval of complex numbers is a pair of them."""
    if isinstance(node, Interval) and not all(end.is_extended_real for end in args[:2]):
        return Tuple(*args[:2])
    return node.func(*args, evaluate=False) if isinstance(node, Relational) else node.func(*args)


def _real_root(power: Any) -> Any:
    """(−b)^(p/q) as (−1)^p · b^(p/q) for an odd q and positive b, or b of whose sign nothing is known."""
    base, exponent = power.base, power.exp.doit() if power.exp.is_number else power.exp
    if not isinstance(exponent, Rational) or exponent.q % 2 == 0 or exponent.q == 1:
        return power
    size = None if base.free_symbols else base.evalf(15)
    negative = base.could_extract_minus_sign() if size is None else size.is_real and size < 0
    return (-1) ** exponent.p * Pow(-base, exponent) if negative else power


def _check_size(expression: Any) -> None:
    """ValueError for a power or a factorial of over 10,000 digits, which sympy would compute to the last of them."""
    for node in postorder_traversal(expression):  # the parts of a tower before the tower
        if isinstance(node, Pow | factorial) and not node.free_symbols and _digits(node) > _MOST_DIGITS:
            raise ValueError(f"a number of more than {_MOST_DIGITS} digits")


def _digits(node: Any) -> Any:
    """About how many digits a power, its reciprocal or a factorial has before or after its point."""
    base, exponent = node.args if isinstance(node, Pow) else (node.args[0], node.args[0])
    size, times = (abs(part.evalf(15)) for part in (base, exponent))
    known = size.is_Number and times.is_Number and size.is_finite and times.is_finite and size > 0
    return abs(log(size) / log(10.0)) * times if known else 0
