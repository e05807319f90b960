r"""Parses a final answer as a number, as words or as a formula, before any algebra.

Words are compared as words ("cat" is not c·a·t), formulas by sympy, numbers exactly. An "and" or "or" between formulas
is the comma of a list, one \pm in a formula stands for two, and of an equation the side counts that is the answer.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from lockstep.rl.verifiers.math.cases import Pieces, as_list, pieces_of
from lockstep.rl.verifiers.math.normalize import clean
from lockstep.rl.verifiers.math.numbers import FUNCTIONS, Number, is_prose, number_of, scaled_number
from lockstep.rl.verifiers.math.units import canonical, split_unit

EQUALS = re.compile(r"(?<![<>!=:\\])=(?!=)")
_ARITHMETIC = re.compile(r"[0-9)}]\s*(?:[-+*/]|\\times|\\cdot|\\div)\s*[0-9({\\]")
_INSIDE = re.compile(r"\^\s*(?:\{[^{}]*\}|\([^()]*\))|\[[^\[\]]*\]")
"""Exponents and the degrees of roots, in which a fraction is no calculation."""
_COMPLEX = re.compile(r"[-+]?\s*[0-9.]+\s*[-+]\s*[-+]?\s*[0-9.]*\s*\*?\s*i")
_APPROXIMATES = re.compile(r"\\(?:approx|simeq|sim)(?![a-z])")
_LONGEST = 10_000
_NAME = re.compile(r"\s*[a-zA-Z](?:_\{?\w+\}?)?\s*|\s*[a-zA-Z]{2,}\s*")
_WORD = re.compile(r"[^\W\d_]{3,}|\b(?:or|no|to|of|is)\b")
_LATEX_NAME = re.compile(rf"\\(?:begin|end)\{{[a-z]*\}}|\\[a-zA-Z]+|\b(?:sqrt|{FUNCTIONS})\b")
_JUXTAPOSED = re.compile(r"(?<![_^0-9])[0-9]+\s+[0-9]|[0-9]\s*:\s*[0-9]")
_LIST_WORD = re.compile(r"\s*(?:,\s*)?(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*|\s*,\s*,\s*")
_OPTION = re.compile(r"\(([A-J])\)(?::|\s|$)|([A-J])(?:[.):]\s+)(?=\S)")
_NO_UNITS = "iejxyzkKMBT"
"""Letters that are constants, variables or thousands and more, even where LaTeX sets them upright."""
_LETTER_UNITS = "mgslh"
_TEXT_UNIT = re.compile(
    r"(?<=\S)\s*\\(?:text|mathrm|textrm|mbox|rm)\s*\{([^{}]*)\}\s*(\^\s*\{?\s*[23]\s*\}?)?[\s$.\\)\]]*$"
)


@dataclass(frozen=True)
class Reading:
    """A parsed answer: its normalised text, and its number or formula where it is one."""

    text: str
    number: Number | None
    formula: str | None
    unit: str = ""
    """The unit in its canonical form; empty where none was written."""
    pieces: Pieces = ()
    """Values and conditions, where it is a function by cases."""

    @property
    def understood(self) -> bool:
        """Whether it can be compared without algebra; a formula may yet turn out to be unreadable."""
        return self.number is not None or (not self.pieces and len(self.text) <= _LONGEST and is_words(self.text))

    def scaled(self, *, small: bool = True) -> Self | None:
        """The number that 1.5M or 2k may be; without `small` not 2k, which is a formula where a reference has it."""
        number = None if self.number else scaled_number(self.text, small=small)
        return type(self)(self.text, number, None, number.unit) if number else None

    def as_product(self) -> Self | None:
        """The formula that a number with a unit of one letter may be: 2 m as two times m."""
        if self.number is None or len(self.unit) != 1 or self.unit not in _LETTER_UNITS:
            return None
        return type(self)(self.text, None, f"{self.number.value} {self.unit}")


@lru_cache(1024)
def read(raw: str) -> Reading:
    """Parses an answer in any notation; one of more than 10,000 characters counts as words."""
    if len(raw) > _LONGEST:
        return Reading(raw, None, None)
    body, unit = _without_text_unit(raw)
    text = as_list(clean(body))
    if pieces := pieces_of(text):
        return Reading(text, None, None, pieces=pieces)
    number = number_of(text)
    if number is None:
        text, own = split_unit(text)
        unit = unit or own
        number = number_of(text)
    unit = unit or (number.unit if number else "")
    formula = _listed(text)
    is_formula = number is None and formula != "" and not is_words(formula)
    return Reading(text if is_formula or number else as_list(clean(raw)), number, formula if is_formula else None, unit)


def is_words(text: str) -> bool:
    """Whether clean text is words, or numbers side by side, which sympy would multiply."""
    bare = _LATEX_NAME.sub("|", text)
    return number_of(text) is None and (_WORD.search(bare) is not None or _JUXTAPOSED.search(bare) is not None)


def is_calculation(given: Reading, reference: Reading) -> bool:
    """Whether a sum or product was left undone that should be a number; a complex number is none."""
    if reference.number is None or given.number is not None or _COMPLEX.fullmatch(given.text):
        return False
    return _ARITHMETIC.search(_INSIDE.sub("", given.text)) is not None


def is_list(text: str) -> bool:
    """Whether clean text is a list of answers: has commas outside of all brackets."""
    return len(parts(text)) > 1


def parts(text: str) -> list[str]:
    """Clean text split at its commas outside of brackets; a number with thousands separators is one part."""
    depth, found, start = 0, [], 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    return [*found, text[start:].strip()]


def option_of(text: str) -> tuple[str, str] | None:
    """Letter and text of a multiple-choice answer such as "(C) 18"; None for any other text."""
    match = _OPTION.match(text)
    return (match[1] or match[2], text[match.end() :].strip()) if match else None


def answer_side(text: str) -> str:
    """The side of an equation that is the answer: the last, unless it is a list; of x ≈ y the exact one."""
    sides = EQUALS.split(text)
    side = sides[-1] if sides[-1].strip() and not is_list(_listed(as_list(clean(text)))) else text
    exact, *rounded = _APPROXIMATES.split(side)
    if not rounded or not exact.strip():
        return side
    return rounded[-1] if _NAME.fullmatch(clean(exact)) else exact


def _listed(text: str) -> str:
    r"""Clean text with commas for "and" and "or", and two formulas for one with a \pm."""
    joined = _LIST_WORD.sub(", ", text).strip(" ,")
    if r"\pm" not in joined:
        return joined
    return ", ".join(side for part in parts(joined) for side in _both_signs(part))


def _both_signs(part: str) -> list[str]:
    if len(re.findall(r"\\pm(?![a-z])", part)) != 1:
        return [part]
    return [re.sub(r"\\pm(?![a-z])", sign, part) for sign in "+-"]


def _without_text_unit(raw: str) -> tuple[str, str]:
    r"""An answer and the unit that LaTeX marks as text at its end, as in 2\sqrt{3}\text{ m}."""
    match = _TEXT_UNIT.search(raw)
    if not match or not clean(raw[: match.start()]) or not _is_unit(match[1].strip(" .,~")):
        return raw, ""
    return raw[: match.start()], canonical(match[1] + (match[2] or ""))


def _is_unit(text: str) -> bool:
    """Whether words that LaTeX marks as text after a formula are its unit; single letters are, unless they count."""
    return text not in _NO_UNITS if len(text) == 1 else text != "" and is_prose(f" {text}")
