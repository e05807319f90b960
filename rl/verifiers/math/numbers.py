r"""Parses plain numbers exactly, as fractions, without sympy: most answers are one.

A number may be an integer, a decimal, a fraction (3/4, \frac{3}{4}), mixed (1 1/2), in scientific notation, a
percentage, with thousands separators, with a scale ("2 million"), and stand in prose that changes nothing about it.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from lockstep.rl.verifiers.math.units import POWERED, canonical

_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
NUMBER = re.compile(
    rf"""(?<![\w.^])(?P<sign>[-+]?)\s?
    (?: (?P<mixed>[0-9]+)?\s* \\frac\s* \{{\s*(?P<top>[-+]?{_DIGITS})\s*\}}\s* \{{\s*(?P<bottom>[-+]?{_DIGITS})\s*\}}
      | (?:(?P<whole>[0-9]+)\s+)? (?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS})
      | (?P<plain>{_DIGITS})
        (?: [eE](?P<e>[-+]?[0-9]{{1,3}})
          | \s*(?:\\times|\\cdot|\*)\s* 10\s*\^\s*
            (?:\{{\s*(?P<power>[-+]?[0-9]{{1,3}})\s*\}}|(?P<digit>[0-9]{{1,3}})) )?
    )(?P<percent>\s*\\?%|\s+percent\b)? (?:\s+(?P<scale>{"|".join(_SCALES)})s?\b)?
    (?!\s*(?:\.\.|…|!|-\s*$)) (?! (?!(?:[kcm]m|[km]g|m[lL]|lbs?|mph|hrs?|mins?)\b) \w )""",
    re.VERBOSE,
)
_SUFFIXES = {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9, "T": 10**12}
_SUFFIXED = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<size>{_DIGITS})\s?(?P<suffix>{'|'.join(_SUFFIXES)})(?![\w^])(?P<rest>.*)", re.DOTALL
)
_LETTER = r"""(?<![a-z'])(?!
    (?:(?<=[\s(])|(?<=[a-z]/)|(?<=a\.)) (?-i:[mgslh]|[NVWJKCFAL])(?![a-z])
    | (?-i:[aAI])(?=\s|\.m) | i(?=\s[a-z]{2}) ) [a-z](?![a-z])"""
"""Single letters, but for units, articles and "I" in prose."""
FUNCTIONS = "sin|cos|tan|cot|csc|sec|arcsin|arccos|arctan|log|ln|exp|pi|infty|gcd|lcm|mod|max|min"
_COUNTS = "zero one two three four five six seven eight nine ten eleven twelve"
_CHANGING = (
    "or|not|neither|nor|choose|half|halves|third|thirds|quarter|quarters|sqrt|least|most|than|between|except|minus|plus"
    "|alpha|beta|gamma|theta|lambda|sigma|omega|negative|times|squared|cubed|root|divided|factorial|within|twice|double|infinity|infinite|undefined|unknown"
)
_NOT_PROSE = re.compile(
    rf"""[0-9=+*^\\_<>{{}}|√∛×÷·∞≈≠≤≥±½¼¾Α-ω]
    | \b(?:{_CHANGING}|{"|".join(_SCALES)}|{FUNCTIONS.replace("|min", "")})s?\b | n't\b
    | {_LETTER}""",
    re.VERBOSE | re.IGNORECASE,
)
_SPACED = re.compile(r"[-+]?[0-9]{1,3}(?:\ [0-9]{3})+(?:\.[0-9]+)?")
_CONTINENTAL = re.compile(r"[-+]?[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]+")
PLACES = 6
"""Digits after the point that a decimal needs to stand for a number without an end, as 0.333333 for 1/3."""


@dataclass(frozen=True)
class Number:
    """A plain number: 50% has value 50 and the flag; the unit is the canonical form of whatever prose follows."""

    value: Fraction
    percent: bool = False
    unit: str = ""
    places: int = 0
    """Digits after the point, as written."""


def number_of(text: str) -> Number | None:
    """The only number in clean text, if all else in it is prose; None for several, for a formula and for x/0."""
    text = _separated(text)
    found = list(NUMBER.finditer(text))
    if len(found) != 1:
        return _count(text)
    match = found[0]
    if not (is_prose(text[: match.start()]) and is_prose(POWERED.sub("", text[match.end() :]))):
        return None
    try:
        value, places = _value(match)
    except (ValueError, ZeroDivisionError):
        return None
    return Number(value, match["percent"] is not None, canonical(text[match.end() :]), places)


def scaled_number(text: str, *, small: bool) -> Number | None:
    """The number of clean text such as 1.5M or 250k, with prose behind it; without `small` k is no suffix."""
    match = _SUFFIXED.fullmatch(text)
    if not match or not is_prose(match["rest"]) or (match["suffix"] == "k" and not small):
        return None
    size = Fraction(match["size"].replace(",", "")) * _SUFFIXES[match["suffix"]]
    return Number(-size if match["sign"] == "-" else size, unit=canonical(match["rest"]))


def is_prose(text: str) -> bool:
    """Whether text has nothing that would change a number beside it: digits, operators, variables, "at least", "or"."""
    return _NOT_PROSE.search(text) is None


def same_number(one: Number, other: Number) -> bool:
    """Exact equality, or a decimal of six places or more to which a fraction without an end is rounded or truncated.

    A percentage is its number with or without the sign: 50% is 50 and 1/2, and no other percentage.
    """
    if one.percent == other.percent:
        return _same(one, other.value) or _same(other, one.value)
    percent, plain = (one, other) if one.percent else (other, one)
    return _same(plain, percent.value) or _same(plain, percent.value / 100) or _same(percent, plain.value)


def rounds_to(exact: Fraction, number: Number) -> bool:
    """Whether `number` is a decimal of enough places to which `exact` is rounded or truncated."""
    written, wanted = (abs(value) * 10**number.places for value in (number.value, exact))
    if number.places < PLACES or written < 10 ** (PLACES - 1) or number.value * exact < 0:
        return False
    return written in (floor(wanted), floor(wanted + Fraction(1, 2)))


def _same(decimal: Number, exact: Fraction) -> bool:
    return decimal.value == exact or (_is_endless(exact) and rounds_to(exact, decimal))


def _is_endless(value: Fraction) -> bool:
    """Whether a decimal cannot write it: its denominator has another factor than 2 and 5."""
    return 10 ** value.denominator.bit_length() % value.denominator != 0


def _separated(text: str) -> str:
    """Thousands that are set apart by spaces, or by points before a comma, where the text is nothing else."""
    if _SPACED.fullmatch(text):
        return text.replace(" ", "")
    if _CONTINENTAL.fullmatch(text):
        return text.replace(".", "").replace(",", ".")
    return text


def _count(text: str) -> Number | None:
    """A small number that is written as a word, and nothing else."""
    names = _COUNTS.split()
    return Number(Fraction(names.index(text.casefold()))) if text.casefold() in names else None


def _value(match: re.Match[str]) -> tuple[Fraction, int]:
    """The number without its percent sign, and its places; ValueError above 4300 digits, ZeroDivisionError for x/0."""
    part = {name: (match[name] or "").replace(",", "") for name in match.groupdict()}
    places = 0
    if part["plain"]:
        exponent = int(part["e"] or part["power"] or part["digit"] or 0)
        size = Fraction(part["plain"]) * Fraction(10) ** exponent
        places = max(0, len(part["plain"].partition(".")[2]) - exponent)
    else:
        quotient = Fraction(part["top"] or part["over"]) / Fraction(part["bottom"] or part["under"])
        size = Fraction(part["mixed"] or part["whole"] or 0) + quotient
    size *= _SCALES.get(part["scale"], 1)
    return (-size if part["sign"] == "-" else size), places
