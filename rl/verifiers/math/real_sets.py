r"""Reads inequalities in one variable as sets of real numbers, so that x < -1 or x > 1 is two open half-lines.

An "or" joins sets and an "and" intersects them; a comma does what leaves something: x > 1, x < 5 is (1, 5), and
x < -1, x > 1 is both. A set-builder is its condition.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

from sympy import Complement, FiniteSet, Float, Intersection, Interval, Rational, Reals, Set, Union, oo

from lockstep.rl.verifiers.math.equality import same
from lockstep.rl.verifiers.math.expressions import expression_of
from lockstep.rl.verifiers.math.parsing import parts

_NAME = r"(?:[a-zA-Z]|\\(?:alpha|beta|theta|lambda|mu|phi))(?:_\{?\w+\}?)?"
_BUILDER = re.compile(
    rf"(?:{_NAME}\s*\\in\s*)?\\\{{\s*({_NAME})\s*(?:\\in\s*\\mathbb\s*\{{?R\}}?\s*)?(?:\\mid|\\vert|:|\|)(.+?)\\\}}",
    re.DOTALL,
)
_ALL = re.compile(r"(?:all|any)(?: the)? reals?(?: numbers?)?", re.IGNORECASE)
_OR = re.compile(r"(?<![a-zA-Z\\])or(?![a-zA-Z])|\\(?:lor|vee)(?![a-zA-Z])")
_CUP = re.compile(r"\\cup(?![a-zA-Z])")
_AND = re.compile(r"(?<![a-zA-Z\\])and(?![a-zA-Z])|\\(?:land|wedge)(?![a-zA-Z])")
_RELATION = re.compile(r"\s*(\\(?:le|ge|ne|lt|gt)(?![a-zA-Z])|<|>|(?<![<>!])=)\s*")
_SET = re.compile(r"\\(?:le|ge|ne|lt|gt|in)(?![a-zA-Z])|[<>]")
_INEQUALITY = re.compile(r"\\(?:le|ge|ne|lt|gt)(?![a-zA-Z])|[<>]")
_MEMBER = re.compile(rf"\s*({_NAME})\s*\\in(?![a-zA-Z])(.+)", re.DOTALL)
_PLAIN = {r"\le": "<=", r"\ge": ">=", r"\lt": "<", r"\gt": ">", r"\ne": "!="}


@dataclass(frozen=True)
class RealSet:
    """The numbers that a variable may be."""

    variable: str
    """Empty for a set that names none."""
    numbers: Set

    def is_same_as(self, other: "RealSet") -> bool:
        """Whether two sets are equal and of the same variable, if both name one."""
        if self.variable != other.variable and self.variable and other.variable:
            return False
        are_finite = {isinstance(one.numbers, FiniteSet) for one in (self, other)}
        return len(are_finite) == 1 and same(self.numbers, other.numbers)


@lru_cache(1024)
def real_set(text: str) -> RealSet | None:
    """The set that clean text describes by inequalities in one variable; None where it describes none."""
    if _ALL.fullmatch(text):
        return RealSet("", Reals)
    return _described(text) if _SET.search(text) else None


def other_numbers(conditions: Iterable[str]) -> RealSet | None:
    """The numbers for which none of several conditions holds; None where one of them is no set of numbers."""
    union = _one([_described(condition) for condition in conditions], Union)
    return union and RealSet(union.variable, Complement(Reals, union.numbers))


def _described(text: str) -> RealSet | None:
    built = _BUILDER.fullmatch(text.strip())
    return _one([_conjunction(part) for part in _alternatives(built[2] if built else text)], Union)


def _alternatives(text: str) -> list[str]:
    """The text split at each "or", and at unions of inequalities."""
    split = _CUP.split(text)
    joined = split if all(_INEQUALITY.search(part) for part in split) else [text]
    return [part for one in joined for part in _OR.split(one)]


def _conjunction(text: str) -> RealSet | None:
    """What parts that are joined by "and" or commas have in common; with commas all of them, if they have nothing."""
    found = [_statement(part) for one in _AND.split(text) for part in _spelled_out(parts(one))]
    common = _one(found, Intersection)
    return _one(found, Union) if common and common.numbers.is_empty and not _AND.search(text) else common


def _spelled_out(statements: list[str]) -> Iterator[str]:
    r"""The statements, and each of x \ne \pm 1 and x \ne 1, 2 by itself."""
    head = ""
    for statement in statements:
        head = statement.partition(r"\ne")[0] + r"\ne" if r"\ne" in statement else head
        full = statement if _RELATION.search(statement) or not head else f"{head} {statement}"
        yield from [full.replace(r"\pm", sign) for sign in "+-"] if head and r"\pm" in full else [full]


def _one(sets: Iterable[RealSet | None], join: Any) -> RealSet | None:
    """All of them joined, if they are of one variable."""
    found = list(sets)
    if not all(found) or len({one.variable for one in found if one}) != 1:
        return None
    return RealSet(found[0].variable, reduce(join, [one.numbers for one in found if one])) if found[0] else None


def _statement(text: str) -> RealSet | None:
    """One membership, inequality, equation or chain a < x < b."""
    if member := _MEMBER.fullmatch(text):
        numbers = expression_of(member[2].strip())
        return RealSet(member[1], numbers) if isinstance(numbers, Set) else None
    sides = [side.strip() for side in _RELATION.split(text)]
    names = [place for place in range(0, len(sides), 2) if re.fullmatch(_NAME, sides[place])]
    if len(sides) not in (3, 5) or len(names) != 1 or (len(sides) == 5 and names != [2]):
        return None
    steps = [_half_line(sides[place : place + 3], at_left=names[0] == place) for place in range(0, len(sides) - 2, 2)]
    return _one([step and RealSet(sides[names[0]], step) for step in steps], Intersection)


def _half_line(relation: list[str], *, at_left: bool) -> Set | None:
    """The numbers for which `left sign right` holds, where one side is the variable and the other a number."""
    left, sign, right = relation[0], _PLAIN.get(relation[1], relation[1]), relation[2]
    bound = _bound(right if at_left else left)
    if bound is None:
        return None
    if sign in ("=", "!="):
        return FiniteSet(bound) if sign == "=" else Complement(Reals, FiniteSet(bound))
    below = (sign in ("<", "<=")) == at_left
    is_open = sign in ("<", ">")
    return Interval(-oo, bound, True, is_open) if below else Interval(bound, oo, is_open, True)


def _bound(text: str) -> Any | None:
    """A real number, exact, or an infinity."""
    found = expression_of(text)
    if found in (oo, -oo):
        return found
    if found is None or not getattr(found, "is_number", False) or not found.is_real:
        return None
    return found.replace(lambda part: isinstance(part, Float), lambda part: Rational(str(float(part))))
