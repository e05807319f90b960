"""Whether two sympy expressions are the same answer: by value where they have one, part by part, else by algebra.

math_verify's own comparison rounds to six places and drops what is smaller than its precision, so that 2^-2006 is 0 in
a tuple. Here lists, tuples, intervals and matrices are compared entry by entry, numbers by value, and formulas that
differ at a point differ. What is left (equations, unions, identities) is math_verify's.
"""

from fractions import Fraction
from typing import Any

from math_verify import verify
from sympy import (
    Derivative,
    Expr,
    FiniteSet,
    Float,
    Integral,
    Interval,
    Limit,
    MatrixBase,
    Product,
    Sum,
    Tuple,
    UnevaluatedExpr,
)

from lockstep.rl.verifiers.math.expressions import DIGITS, value_of
from lockstep.rl.verifiers.math.numbers import Number, rounds_to

_ALIKE = Float("1e-30", DIGITS)
_ALIKE_WITH_DECIMALS = Float("1e-12", DIGITS)
_ALIKE_SOMEWHERE = Float("1e-9", DIGITS)
_POINTS = (Float("0.3718281828459045235360287", DIGITS), Float("1.2142135623730950488016887", DIGITS))
_NOT_AT_A_POINT = (Sum, Product, Integral, Limit, Derivative)


def same(gold: Any, target: Any) -> bool:
    """Whether a target is the reference `gold`; a decimal of six places or more may stand for what has no end."""
    if gold == target:
        return True
    if isinstance(gold, FiniteSet) and isinstance(target, FiniteSet):
        return _same_elements(gold.args, target.args)
    if isinstance(gold, Tuple) and isinstance(target, Tuple):
        return len(gold) == len(target) and all(map(same, gold, target))
    if isinstance(gold, Interval) and isinstance(target, Interval):
        open_ends = gold.left_open == target.left_open and gold.right_open == target.right_open
        return bool(open_ends) and same(gold.start, target.start) and same(gold.end, target.end)
    if isinstance(gold, MatrixBase) and isinstance(target, MatrixBase):
        return gold.shape == target.shape and all(map(same, gold.flat(), target.flat()))
    if isinstance(gold, Expr) and isinstance(target, Expr):
        return _same_expression(gold, target)
    return _by_algebra(gold, target)


def rounded(exact: Any, number: Number | None) -> bool:
    """Whether `number` is a decimal of enough places that a value rounds to."""
    if number is None or number.percent or not exact.is_real:
        return False
    return rounds_to(Fraction(int(exact.p), int(exact.q)) if exact.is_Rational else Fraction(str(exact)), number)


def _same_expression(gold: Any, target: Any) -> bool:
    values = value_of(gold), value_of(target)
    if gold.has(UnevaluatedExpr) or target.has(UnevaluatedExpr):  # a percentage, which is its number, too
        return _by_algebra(gold, target)
    if values[0] is not None and values[1] is not None:
        return _near(*values, decimals=gold.has(Float) or target.has(Float)) or (
            rounded(values[0], _decimal(target)) or rounded(values[1], _decimal(gold))
        )
    return not _differ_somewhere(gold, target) and _by_algebra(gold, target)


def _same_elements(some: Any, others: Any) -> bool:
    """Whether each element has its equal among the others, in any order."""
    left = list(others)
    for one in some:
        found = next((other for other in left if same(one, other)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _near(one: Any, other: Any, *, decimals: bool) -> bool:
    """Whether two values differ by rounding only; sympy keeps 15 digits of a decimal in a formula."""
    if one.is_Rational and other.is_Rational:
        return bool(one == other)
    bound = _ALIKE_WITH_DECIMALS if decimals else _ALIKE
    return bool(abs(one - other) <= bound * max(abs(one), abs(other)))


def _decimal(expression: Any) -> Number | None:
    """The number that a decimal was written as."""
    if not isinstance(value := expression.doit(), Float) or not 1e-9 < abs(value) < 1e9:
        return None
    digits = f"{float(value):.15f}" if "e" in repr(float(value)) else repr(float(value))
    return Number(Fraction(digits), places=len(digits.partition(".")[2]))


def _differ_somewhere(gold: Any, target: Any) -> bool:
    """Whether two formulas have values at a point that are not alike; of two numbers too small to add, their ratio."""
    if gold == 0 or target == 0 or gold.has(*_NOT_AT_A_POINT) or target.has(*_NOT_AT_A_POINT):
        return False
    names = sorted(gold.free_symbols | target.free_symbols, key=str)
    for point in _POINTS:
        at = {name: point + place for place, name in enumerate(names)}
        one, other = (expression.evalf(20, subs=at) for expression in (gold, target))
        if one.is_number and other.is_number and not _alike(one, other):
            return True
    return False


def _alike(one: Any, other: Any) -> bool:
    return bool(abs(one - other) <= _ALIKE_SOMEWHERE * max(abs(one), abs(other)))


def _by_algebra(gold: Any, target: Any) -> bool:
    return bool(verify(gold, target, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True))
