r"""Grades a mathematical response: correct only where the answer that it states as final is the reference answer.

`extraction` finds the final answer and `parsing` takes it as number, words or formula. Answers that are written alike
are the same, whether algebra can read them or not. Plain numbers are compared exactly, as fractions; words as words;
inequalities as `real_sets`; functions by `cases` piece by piece; all other formulas by their values or by algebra
(`equality`). Whatever reading or comparing a final answer raises makes it incorrect; only a reference that cannot be
read makes it ungradable. Nothing here has a time limit: sympy can run for hours on a hostile expression, so grade
untrusted text through `AnswerPool`.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from sympy import Rational, Set

from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.verifiers.math.cases import OTHERWISE, Pieces
from lockstep.rl.verifiers.math.equality import rounded, same
from lockstep.rl.verifiers.math.expressions import expression_of, value_of
from lockstep.rl.verifiers.math.extraction import boxed_list, final_answer
from lockstep.rl.verifiers.math.normalize import as_words
from lockstep.rl.verifiers.math.numbers import same_number
from lockstep.rl.verifiers.math.parsing import EQUALS, Reading, answer_side, is_calculation, option_of, read
from lockstep.rl.verifiers.math.real_sets import RealSet, other_numbers, real_set
from lockstep.rl.verifiers.math.units import agree

EXAMPLES = ((r"\boxed{x^2-1}", "(x-1)(x+1)"), (r"\boxed{\sin^2 x+\cos^2 x}", "1"), (r"\boxed{(1, 2]}", "[1, 2]"))
"""Pairs that a process grades at its start, to load the parts of sympy that most formulas need (a second)."""


def grade(response: str, answer: str) -> Verdict:
    """Whether the final answer of `response` is the reference `answer`. Raises nothing, but may take forever.

    Where the reference has several answers, the last boxes count as one list if only commas, "and" and "or" stand
    between them.
    """
    return _grade(response, answer, final_answer)


def grade_stated(stated: str, answer: str) -> Verdict:
    """As `grade`, for a final answer that has been extracted already."""
    return _grade(stated, answer, str)


def _grade(text: str, answer: str, find: Callable[[str], str | None]) -> Verdict:
    reference = read(answer)
    try:
        answers = _stated(text, reference, find)
        ways = [(stated, way) for stated in answers for way in _ways(stated, reference)]
        spelled = [(stated, read(stated)) for stated in answers]
        if found := next((stated for stated, way in spelled + ways if _alike(way, reference)), None):
            return Verdict(Outcome.correct, extracted=found)
        if problem := _problem(reference):
            return Verdict(Outcome.ungradable, problem)
        if found := next((stated for stated, way in ways if _same(way, reference)), None):
            return Verdict(Outcome.correct, extracted=found)
        return _incorrect(*ways[0], reference) if ways else Verdict(Outcome.incorrect, "no final answer")
    except Exception as error:  # in as many ways as there are expressions; the reference has been read by itself
        reason = f"the final answer cannot be graded: {type(error).__name__}: {error}"
        return Verdict(Outcome.incorrect, reason[:500])


def _stated(text: str, reference: Reading, find: Callable[[str], str | None]) -> list[str]:
    """The final answer, and where the reference is a list, the last boxes as one."""
    listed = boxed_list(text) if "," in reference.text else None
    return [stated for stated in (find(text), listed) if stated is not None]


def _ways(stated: str, reference: Reading) -> list[Reading]:
    """How an answer may be meant: as it stands, or as one side of an equation or an approximation; or as a choice."""
    given = read(stated)
    ways = [given]
    if not EQUALS.search(reference.text) and not given.pieces and (side := answer_side(stated)) != stated:
        ways = [read(side)]
    if choice := option_of(given.text):
        ways += [read(part) for part in choice if part]
    return ways


def _problem(reference: Reading) -> str:
    """Why nothing can be compared with a reference; empty where something can."""
    if reference.understood:
        return ""
    try:
        return _unreadable(reference)
    except Exception as error:  # as in _grade
        reason = f"reading the reference answer {reference.text[:80]!r} raised {type(error).__name__}: {error}"
        return reason[:500]


@lru_cache(1024)
def _unreadable(reference: Reading) -> str:
    """As `_problem`; raises what sympy raises."""
    found = expression_of(reference.formula)
    value_of(found)
    is_readable = found is not None or reference.pieces or real_set(reference.text)
    return "" if is_readable else f"the reference answer {reference.text[:80]!r} cannot be read"


def _incorrect(stated: str, given: Reading, reference: Reading) -> Verdict:
    if not given.understood and not given.pieces and expression_of(given.formula) is None:
        return Verdict(Outcome.incorrect, "the final answer cannot be read", stated)
    if is_calculation(given, reference):
        return Verdict(Outcome.incorrect, "the final answer is a calculation that was not carried out", stated)
    return Verdict(Outcome.incorrect, extracted=stated)


def _alike(given: Reading, reference: Reading) -> bool:
    """Whether two answers are written alike."""
    is_alike = given.text != "" and as_words(given.text) == as_words(reference.text)
    return is_alike and agree(given.unit, reference.unit)


def _same(given: Reading, reference: Reading) -> bool:
    if _alike(given, reference):
        return True
    if given.pieces and reference.pieces:
        return _same_pieces(given, reference)
    return any(_equal(one, other) for one, other in _meanings(given, reference) if agree(one.unit, other.unit))


def _meanings(given: Reading, reference: Reading) -> Iterator[tuple[Reading, Reading]]:
    """Both as they were read, and where only one is a number, what a letter after the other's digits may mean."""
    yield given, reference
    if reference.number and not given.number:
        if scaled := given.scaled():
            yield scaled, reference
        if product := reference.as_product():
            yield given, product
    if given.number and not reference.number:
        if scaled := reference.scaled(small=False):
            yield given, scaled
        if product := given.as_product():
            yield product, reference


def _equal(given: Reading, reference: Reading) -> bool:
    if given.number and reference.number:
        return same_number(given.number, reference.number)
    return not is_calculation(given, reference) and _same_formula(given, reference)


def _same_pieces(given: Reading, reference: Reading) -> bool:
    """Whether two functions have the same values under the same conditions, in any order."""
    left = _domains(given.pieces)
    for value, domain in _domains(reference.pieces):
        pieces = [piece for piece in left if _same_domain(piece[1], domain) and _same(read(piece[0]), read(value))]
        if not pieces:
            return False
        left.remove(pieces[0])
    return not left


def _domains(pieces: Pieces) -> list[tuple[str, RealSet | str]]:
    """Values and the numbers for which they hold, where the conditions say that, else the conditions."""
    rest = other_numbers(condition for _, condition in pieces if condition != OTHERWISE)
    return [
        (value, (rest if condition == OTHERWISE else real_set(condition)) or condition) for value, condition in pieces
    ]


def _same_domain(one: RealSet | str, other: RealSet | str) -> bool:
    if isinstance(one, RealSet) and isinstance(other, RealSet):
        return one.is_same_as(other)
    return isinstance(one, str) and isinstance(other, str) and _same(read(one), read(other))


def _same_formula(given: Reading, reference: Reading) -> bool:
    gold, target = _symbolic(reference), _symbolic(given)
    wanted, found = real_set(reference.text), real_set(given.text)
    if wanted and found:
        return wanted.is_same_as(found)
    if wanted and isinstance(target, Set):
        return wanted.is_same_as(RealSet("", target))
    if found and isinstance(gold, Set):
        return found.is_same_as(RealSet("", gold))
    if gold is None or target is None:
        return False
    return same(gold, target) or _rounds(gold, target, reference, given)


def _symbolic(reading: Reading) -> Any | None:
    """The expression of a reading; a plain number's is made only when the other side turned out to be a formula."""
    if reading.number is None:
        return expression_of(reading.formula)
    value = reading.number.value / (100 if reading.number.percent else 1)
    return Rational(value.numerator, value.denominator)


def _rounds(gold: Any, target: Any, reference: Reading, given: Reading) -> bool:
    """Whether one is a decimal of enough places that the other rounds to."""
    number, exact = (reference.number, target) if reference.number else (given.number, gold)
    value = value_of(exact) if number else None
    return value is not None and rounded(value, number)
