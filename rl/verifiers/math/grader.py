r"""Grades a mathematical response: correct only where the answer that it states as final is the reference answer.

`extraction` finds the final answer and `parsing` takes it as number, words or formula. Plain numbers are compared
exactly, as fractions; words as words; formulas without variables by their value to 30 digits; all others by
math_verify. A decimal stands for a number that has no end only from six places on. Nothing here has a
time limit: sympy can run for hours on a hostile expression, so grade untrusted text through `AnswerPool`.
"""

import re
from fractions import Fraction
from functools import lru_cache
from math import log10
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr, Float, I, Pow, Symbol, factorial, nan, oo, postorder_traversal, zoo

from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.verifiers.math.extraction import boxed_list, final_answer
from lockstep.rl.verifiers.math.normalize import as_words
from lockstep.rl.verifiers.math.numbers import FUNCTIONS, Number, rounds_to, same_number
from lockstep.rl.verifiers.math.parsing import ARITHMETIC, EQUALS, Reading, answer_side, option_of, read
from lockstep.rl.verifiers.math.units import agree

EXAMPLES = ((r"\boxed{x^2-1}", "(x-1)(x+1)"), (r"\boxed{\sin^2 x+\cos^2 x}", "1"), (r"\boxed{(1, 2]}", "[1, 2]"))
"""Pairs that a process grades at its start, to load the parts of sympy that most formulas need (a second)."""
_LONGEST_FORMULA = 1000
_MOST_DIGITS = 10_000
_I = Symbol("i", real=False)
"""As math_verify reads it: a variable, which in a formula with no other is the imaginary unit."""
_DIGITS = 40
_ALIKE = Float("1e-30", _DIGITS)
_ALIKE_WITH_DECIMALS = Float("1e-12", _DIGITS)


def grade(response: str, answer: str) -> Verdict:
    """Whether the final answer of `response` is the reference `answer`. Raises nothing, but may take forever.

    A response without a final answer is incorrect; a reference that cannot be read, or a comparison that fails, makes
    the item ungradable. Where the reference has several answers, the last boxes count as one list if only commas, "and"
    and "or" stand between them.
    """
    try:
        reference = read(answer)
        verdict = _judge(final_answer(response), reference)
        if verdict.outcome is Outcome.incorrect and "," in reference.text and (listed := boxed_list(response)):
            return _judge(listed, reference)
        return verdict
    except Exception as error:  # sympy fails in as many ways as there are expressions; none of them is the model's
        return _failed(answer, error)


def grade_stated(stated: str, answer: str) -> Verdict:
    """As `grade`, for a final answer that has been extracted already."""
    try:
        return _judge(stated, read(answer))
    except Exception as error:  # as in grade
        return _failed(answer, error)


def _failed(answer: str, error: Exception) -> Verdict:
    reason = f"grading against {answer[:80]!r} raised {type(error).__name__}: {error}"
    return Verdict(Outcome.ungradable, reason[:500])


def _judge(stated: str | None, reference: Reading) -> Verdict:
    if not reference.understood and _expression(reference.formula) is None:
        return Verdict(Outcome.ungradable, f"the reference answer {reference.text[:80]!r} cannot be read")
    return Verdict(Outcome.incorrect, "no final answer") if stated is None else _compare(stated, reference)


def _compare(stated: str, reference: Reading) -> Verdict:
    given = read(stated)
    for reading in _ways(stated, given, reference):
        if _same(reading, reference):
            return Verdict(Outcome.correct, extracted=stated)
    if not given.understood and _expression(given.formula) is None:
        return Verdict(Outcome.incorrect, "the final answer cannot be read", stated)
    if _is_calculation(given, reference):
        return Verdict(Outcome.incorrect, "the final answer is a calculation that was not carried out", stated)
    return Verdict(Outcome.incorrect, extracted=stated)


def _ways(stated: str, given: Reading, reference: Reading) -> list[Reading]:
    """How an answer may be meant: as it stands, or as one side of an equation or an approximation; or as a choice."""
    ways = [given]
    if not EQUALS.search(reference.text) and (side := answer_side(stated)) != stated:
        ways = [read(side)]
    if choice := option_of(given.text):
        ways += [read(part) for part in choice if part]
    return ways


def _is_calculation(given: Reading, reference: Reading) -> bool:
    return reference.number is not None and given.number is None and ARITHMETIC.search(given.text) is not None


def _same(given: Reading, reference: Reading) -> bool:
    if given.text and as_words(given.text) == as_words(reference.text):
        return agree(given.unit, reference.unit)
    if not agree(given.unit, reference.unit):
        return False
    if given.number and reference.number:
        return same_number(given.number, reference.number)
    if _is_calculation(given, reference):
        return False
    return _same_formula(given, reference)


def _same_formula(given: Reading, reference: Reading) -> bool:
    gold, target = _symbolic(reference), _symbolic(given)
    if gold is None or target is None:
        return False
    values = _value(gold), _value(target)
    if values[0] is None or values[1] is None:
        return bool(verify(gold, target, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True))
    decimals = gold.has(Float) or target.has(Float)
    return _near(*values, decimals=decimals) or _rounded(*values, reference.number, given.number)


def _symbolic(reading: Reading) -> Any | None:
    """The expression of a reading; a plain number's is made only when the other side turned out to be a formula."""
    if reading.number is None:
        return _expression(reading.formula)
    return _expression(str(reading.number.value / (100 if reading.number.percent else 1)))


def _value(expression: Any) -> Any | None:
    """The value of a formula without variables, exact or to 40 digits; None for sets, matrices, infinities."""
    if not isinstance(expression, Expr) or not expression.free_symbols <= {_I} or expression.has(oo, -oo):
        return None
    exact = expression.subs(_I, I).doit()
    value = exact if exact.is_Rational else exact.evalf(_DIGITS)
    return value if value.is_number and all(part.is_Number for part in value.as_real_imag()) else None


def _near(one: Any, other: Any, *, decimals: bool) -> bool:
    """Whether two values differ by rounding only; sympy keeps 15 digits of a decimal in a formula."""
    if one.is_Rational and other.is_Rational:
        return bool(one == other)
    bound = _ALIKE_WITH_DECIMALS if decimals else _ALIKE
    return bool(abs(one - other) <= bound * max(abs(one), abs(other)))


def _rounded(gold: Any, target: Any, reference: Number | None, given: Number | None) -> bool:
    """Whether one is a decimal of enough places that the other rounds to."""
    number, exact = (reference, target) if reference else (given, gold)
    if number is None or number.percent or not exact.is_real:
        return False
    return rounds_to(Fraction(str(exact)), number)


@lru_cache(1024)  # a group's answers share their reference, and often each other
def _expression(formula: str | None) -> Any | None:
    r"""A formula as sympy reads its LaTeX, or None. Bare function names (sin x, pi) are taken for \sin x and \pi."""
    if formula is None or len(formula) > _LONGEST_FORMULA:  # math_verify's patterns take quadratic time
        return None
    latex = re.sub(rf"(?<![\\a-zA-Z])({FUNCTIONS})(?![a-zA-Z])", r"\\\1", formula)
    parsed = parse(f"${latex}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    found = next((expression for expression in parsed if not expression.has(zoo, nan)), None)
    if found is not None:
        _check_size(found)
    return found


def _check_size(expression: Any) -> None:
    """ValueError for a power or a factorial of over 10,000 digits, which sympy would compute to the last of them."""
    for node in postorder_traversal(expression):  # the parts of a tower before the tower
        if isinstance(node, Pow | factorial) and not node.free_symbols:
            base, exponent = node.args if isinstance(node, Pow) else (node.args[0], node.args[0])
            size, times = (abs(complex(part.evalf(15))) for part in (base, exponent))
            if size > 0 and abs(log10(size)) * times > _MOST_DIGITS:
                raise ValueError(f"a number of more than {_MOST_DIGITS} digits")
