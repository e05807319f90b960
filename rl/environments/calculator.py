"""Evaluates arithmetic exactly, in fractions, by a parser of its own: no text of a model is run as a program."""

import re
from fractions import Fraction

BITS = 8192
"""Bits of the largest number that a result or an intermediate step may have: some 2400 digits."""
NESTED = 50
"""Nesting depth of parentheses and exponents."""

_TOKEN = re.compile(r"\s*(?:(?P<number>\d[\d_,]*(?:\.\d*)?|\.\d+)|(?P<sign>\*\*|//|[-+*/%^()]))")
_SPELLED = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})


class NoArithmetic(ValueError):
    """An expression that cannot be calculated; the message says why, in one sentence."""


def calculate(expression: str) -> str:
    """The value of an expression: a whole number, or a fraction with its decimal as in "1/3 ≈ 0.333333333333".

    It knows + - * / // % ^ (or **), parentheses and decimals, which are exact.

    Raises:
        NoArithmetic: says what cannot be read or calculated.
    """
    value = _Reader(expression).value()
    if value.denominator == 1:
        return str(value)
    try:
        decimal = f"{float(value):.12g}"
    except OverflowError:
        return str(value)
    return f"{value} {'=' if Fraction(decimal) == value else '≈'} {decimal}"


class _Reader:
    """A recursive-descent parser that evaluates as it reads; each level of precedence is a method."""

    def __init__(self, text: str) -> None:
        self._tokens, self._depth = list(reversed(_tokens(text))), 0

    def value(self) -> Fraction:
        """The value of the whole text."""
        found = self._sum()
        if self._tokens:
            raise NoArithmetic(f"{self._tokens[-1]!r} stands where an operator or the end should be")
        return found

    def _next(self, *signs: str) -> str:
        """The next sign, taken, if it is one of these; else nothing."""
        return self._tokens.pop() if self._tokens and self._tokens[-1] in signs else ""

    def _sum(self) -> Fraction:
        found = self._product()
        while sign := self._next("+", "-"):
            other = self._product()
            found = _bounded(found + other if sign == "+" else found - other)
        return found

    def _product(self) -> Fraction:
        found = self._signed()
        while sign := self._next("*", "/", "//", "%"):
            found = _bounded(_combined(found, sign, self._signed()))
        return found

    def _signed(self) -> Fraction:
        negative = False
        while sign := self._next("+", "-"):
            negative ^= sign == "-"
        found = self._power()
        return -found if negative else found

    def _power(self) -> Fraction:
        base = self._atom()
        return _power(base, self._exponent()) if self._next("^", "**") else base

    def _exponent(self) -> Fraction:
        self._deeper()
        found = self._signed()
        self._depth -= 1
        return found

    def _atom(self) -> Fraction:
        if self._next("("):
            self._deeper()
            found = self._sum()
            self._depth -= 1
            if not self._next(")"):
                raise NoArithmetic("a parenthesis is not closed")
            return found
        if not self._tokens or self._tokens[-1][0] not in ".0123456789":
            raise NoArithmetic(
                f"a number is missing {f'before {self._tokens[-1]!r}' if self._tokens else 'at the end'}"
            )
        return _bounded(Fraction(self._tokens.pop().replace("_", "").replace(",", "").rstrip(".")))

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > NESTED:
            raise NoArithmetic(f"more than {NESTED} levels lie inside of each other: calculate a part first")


def _tokens(text: str) -> list[str]:
    text, place, found = text.translate(_SPELLED).strip(), 0, []
    if len(text) > 2000:
        raise NoArithmetic(f"an expression of {len(text)} characters is longer than 2000: calculate a part first")
    while place < len(text):
        match = _TOKEN.match(text, place)
        if not match:
            raise NoArithmetic(
                f"{text[place : place + 20].strip()!r} is no arithmetic: use numbers, + - * / // % ^ and ( )"
            )
        found.append(match["number"] or match["sign"])
        place = match.end()
    return found


def _combined(left: Fraction, sign: str, right: Fraction) -> Fraction:
    if sign == "*":
        return left * right
    if not right:
        raise NoArithmetic("division by zero")
    if sign == "/":
        return left / right
    return Fraction(left // right) if sign == "//" else left % right


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise NoArithmetic(f"the exponent {exponent} is not whole, and its power is seldom a fraction")
    if not base and exponent < 0:
        raise NoArithmetic("division by zero")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) not in (0, 1) and (size - 1) * abs(exponent) > BITS:
        raise NoArithmetic(f"the power has more than {BITS} bits")
    return _bounded(Fraction(base ** int(exponent)))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise NoArithmetic(f"a number has more than {BITS} bits")
    return value
