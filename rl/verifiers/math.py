r"""Grades mathematics without guessing: an answer counts only where the completion says that it is the answer.

A final answer is, in this order: the last `\boxed{...}`; the last `#### x`; the last "the answer is x" or "Answer: x";
a completion that is one expression and nothing else; the right side of the last `=` when it ends its sentence and no
later text has numbers; the only number in plain prose. Otherwise there is none, and the completion is incorrect.

Plain numbers are compared exactly, as fractions; words as text; everything else by math_verify, which accepts a decimal
that agrees to six places. A percentage equals its number with or without the sign (50% is 50 and 1/2). Nothing here has
a time limit: sympy can run for hours on a hostile expression, so grade untrusted text through `VerifierPool`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import nan, zoo

from lockstep.rl.verifiers.verdict import Outcome, Verdict

_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"""(?<![\w.^])(?P<sign>[-+]?)\s?
    (?: (?P<mixed>[0-9]+)?\s* \\[dtc]?frac\s* \{{\s*(?P<top>-?{_DIGITS})\s*\}}\s* \{{\s*(?P<bottom>-?{_DIGITS})\s*\}}
      | (?:(?P<whole>[0-9]+)\s+)? (?P<over>{_DIGITS})\s*/\s*(?P<under>{_DIGITS})
      | (?P<plain>{_DIGITS})
        (?: [eE](?P<e>[-+]?[0-9]{{1,3}})
          | \s*(?:\\times|\\cdot|×|\*)\s* 10\s*\^\s*(?:\{{(?P<power>[-+]?[0-9]{{1,3}})\}}|(?P<digit>[0-9]{{1,3}})) )?
    )(?P<percent>\s*\\?%|\s+percent\b)?
    (?!\s*(?:\.\.|…|!)) (?! (?!(?:[kcm]m|[km]g|m[lL]|lbs?|mph|hrs?|mins?)\b) \w )""",
    re.VERBOSE,
)
_SCALES = "hundred|thousand|million|billion|trillion|dozen|half|halves|third|thirds|quarter|quarters"
_FUNCTIONS = "sin|cos|tan|cot|csc|arcsin|arccos|arctan|log|ln|exp|pi|infty|gcd|lcm|mod"
_NOT_PROSE = re.compile(
    rf"""[0-9=+*^\\_<>{{}}|√∛×÷·∞≈≠≤≥±²³½¼¾Α-ω]
    | \b(?:or|not|neither|nor|choose|{_SCALES}|sqrt|{_FUNCTIONS})\b | n't\b
    | (?<![a-z'])(?![aimgslhvwjnkcf]\b)[a-z](?![a-z])
    """,
    re.VERBOSE | re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{3,}|\b(?:or|no|to|of|is)\b")
_LATEX_NAME = re.compile(rf"\\(?:begin|end)\{{[a-z]*\}}|\\[a-zA-Z]+|\b(?:sqrt|{_FUNCTIONS})\b")
_LONGEST_FORMULA = 1000
_JUXTAPOSED = re.compile(r"[0-9]\s+[0-9]|[0-9]\s*:\s*[0-9]")
_ARITHMETIC = re.compile(r"[0-9)}]\s*(?:[-+*/×÷]|\\times|\\cdot|\\div)\s*[0-9({\\]")
_EQUALS = re.compile(r"(?<![<>!=:])=(?!=)")

_BOLD = re.compile(r"(?<![\w)}\]])\*\*(?=\S)([^*\n]+?)\*\*(?!\w)")
_BOX_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"####")
_PHRASE = re.compile(r"\banswer\s*+(?:is\b|:|=)\s*+:?\s*+(?:\\\[|\$\$)?\s*+", re.IGNORECASE)
_CLAUSE_END = re.compile(
    rf"[.;!?](?=\s|$) | ,?\s+(?:because|since|as|which|where)\b | (?<=[0-9$}}%])\s+(?!(?i:{_SCALES})\b)(?=[A-Z][a-z])",
    re.VERBOSE,
)
_SENTENCE_END = re.compile(r"[.;](?=\s|$)|\n|$")
_MATH_SPAN = re.compile(r"(?P<before>[^$\\]*)(?:\$+(?P<dollars>[^$]+)\$+|\\\((?P<parens>.+?)\\\))(?P<after>[^$\\]*)")

_CLEANING: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[,!]|\\?\$|(?<!\\)\\[()\[\]]|\\(?:left|right)(?![a-zA-Z])|[`\"]"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[;: ]|~|\s+"), " "),
    (re.compile(r"\*\*"), "^"),
)


@dataclass(frozen=True)
class _Number:
    """A plain number: 50% has value 50 and the flag; the unit is whatever prose follows, in lower case."""

    value: Fraction
    percent: bool
    unit: str


@dataclass(frozen=True)
class _Reading:
    """An answer as text and, where it has one, as a number or as a sympy expression; a wordy answer has neither."""

    text: str
    number: _Number | None
    expression: Any | None

    @property
    def understood(self) -> bool:
        return self.number is not None or self.expression is not None or _compared_as_text(self.text)


def grade(response: str, answer: str) -> Verdict:
    """Whether the final answer of `response` is the reference `answer`. Raises nothing, but may take forever.

    A response without a final answer is incorrect; a reference that cannot be read, or a comparison that fails, makes
    the item ungradable.
    """
    try:
        reference = _read(answer)
        if not reference.understood:
            return Verdict(Outcome.ungradable, f"the reference answer {answer[:80]!r} cannot be read")
        stated = final_answer(response)
        return Verdict(Outcome.incorrect, "no final answer") if stated is None else _compare(stated, reference)
    except Exception as error:  # sympy fails in as many ways as there are expressions; none of them is the model's
        return Verdict(Outcome.ungradable, f"grading against {answer[:80]!r} raised {type(error).__name__}: {error}")


def final_answer(response: str) -> str | None:
    """The answer that the response states, by the rules of this module; None if it states none."""
    text = _BOLD.sub(r"\1", response)
    for rule in (_boxed, _after_hashes, _after_phrase, _bare, _after_equals, _only_number):
        if stated := rule(text):
            return stated
    return None


def _boxed(text: str) -> str | None:
    """The content of the last box that closes and holds something; of nested boxes, the inner one."""
    start, end = max((span for span in _boxes(text) if text[slice(*span)].strip()), default=(0, 0))
    return text[start:end].strip() or None


def _boxes(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of what each closed box holds, in one pass; escaped braces do not count."""
    opened: list[tuple[bool, int]] = []
    for token in _BOX_TOKEN.finditer(text):
        if token[0] == "}" and opened:
            is_box, start = opened.pop()
            if is_box:
                yield start, token.start()
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append((token[0] != "{", token.end()))


def _after_hashes(text: str) -> str | None:
    return _last_clause(_HASHES, text)


def _after_phrase(text: str) -> str | None:
    return _last_clause(_PHRASE, text)


def _last_clause(marker: re.Pattern[str], text: str) -> str | None:
    """What follows the last marker, to the end of its sentence or to its reasons; of prose with one $formula$, that."""
    ends = [match.end() for match in marker.finditer(text)]
    if not ends:
        return None
    line = text[ends[-1] :].partition("\n")[0].strip()
    clause = _CLAUSE_END.split(line, maxsplit=1)[0].strip()
    span = _MATH_SPAN.fullmatch(clause)
    if span and _is_prose(span["before"]) and _is_prose(span["after"]):
        return (span["dollars"] or span["parens"]).strip()
    return clause.rstrip("$ ") or None


def _bare(text: str) -> str | None:
    """The whole response, if it is one expression, one equation or one word."""
    text = text.strip()
    return text if _is_expression(text) and r"\boxed" not in text and len(_EQUALS.findall(text)) < 2 else None


def _after_equals(text: str) -> str | None:
    """The right side of the last equation, if it is a number or an expression ending the text, with no number later."""
    equals = list(_EQUALS.finditer(text))
    if not equals:
        return None
    tail = text[equals[-1].end() :]
    end = _SENTENCE_END.search(tail, len(tail) - len(tail.lstrip()))
    side, rest = (tail[: end.start()].strip(), tail[end.end() :].strip()) if end else (tail, "")
    usable = _number(_clean(side)) is not None or (not rest and _is_expression(side))
    return side if usable and not re.search("[0-9]", rest) else None


def _only_number(text: str) -> str | None:
    """The one number of a response that is otherwise plain prose."""
    clean = _clean(text)
    found = _NUMBER.search(clean)
    return found[0].strip() if found and _number(clean) else None


def _is_expression(text: str) -> bool:
    single_word = re.fullmatch(r"\(?[\w:]+\)?\.?", text) is not None
    return bool(text) and not re.search(r"[\n;]", text) and (single_word or not _compared_as_text(_clean(text)))


def _is_prose(text: str) -> bool:
    """Whether text holds nothing that changes a number beside it: digits, operators, variables, "million", "or"."""
    return _NOT_PROSE.search(text) is None


def _compared_as_text(text: str) -> bool:
    """Whether text has words, or numbers side by side, which sympy would multiply: "cat" is not c·a·t, nor 1 2 two."""
    bare = _LATEX_NAME.sub("|", text)
    return _number(text) is None and (_WORD.search(bare) is not None or _JUXTAPOSED.search(bare) is not None)


def _clean(text: str) -> str:
    """text without currency and formula marks, spacing commands, quotes and final punctuation."""
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return text.rstrip(" .,;:").lstrip()


def _read(raw: str) -> _Reading:
    text = _clean(raw)
    number = _number(text)
    is_formula = number is None and text != "" and not _compared_as_text(text)
    return _Reading(text, number, _expression(text) if is_formula else None)


def _number(text: str) -> _Number | None:
    """The only number in text, if all else in it is prose; None for several, for a formula and for x/0."""
    found = list(_NUMBER.finditer(text))
    if len(found) != 1 or not (_is_prose(text[: found[0].start()]) and _is_prose(text[found[0].end() :])):
        return None
    try:
        value = _value(found[0])
    except (ValueError, ZeroDivisionError):
        return None
    unit = text[found[0].end() :].strip(" .,;:()").casefold()
    return _Number(value, found[0]["percent"] is not None, unit)


def _value(match: re.Match[str]) -> Fraction:
    """The number without its percent sign. ValueError beyond Python's 4300 digits, ZeroDivisionError for x/0."""
    part = {name: (match[name] or "").replace(",", "") for name in match.groupdict()}
    if part["plain"]:
        exponent = int(part["e"] or part["power"] or part["digit"] or 0)
        size = Fraction(part["plain"]) * Fraction(10) ** exponent
    else:
        quotient = Fraction(part["top"] or part["over"]) / Fraction(part["bottom"] or part["under"])
        size = Fraction(part["mixed"] or part["whole"] or 0) + quotient
    return -size if part["sign"] == "-" else size


def _expression(text: str) -> Any | None:
    r"""text as sympy reads its LaTeX, or None. Bare function names (sin x, pi) are taken for \sin x and \pi."""
    if len(text) > _LONGEST_FORMULA:  # math_verify's patterns take quadratic time
        return None
    latex = re.sub(rf"(?<![\\a-zA-Z])({_FUNCTIONS})(?![a-zA-Z])", r"\\\1", text)
    parsed = parse(f"${latex}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return next((expression for expression in parsed if not expression.has(zoo, nan)), None)


def _compare(stated: str, reference: _Reading) -> Verdict:
    given = _read(_right_side(stated) if "=" not in reference.text else stated)
    if given.text and _as_words(given.text) == _as_words(reference.text):
        return Verdict(Outcome.correct, extracted=stated)
    if not given.understood:
        return Verdict(Outcome.incorrect, "the final answer cannot be read", stated)
    if reference.number and given.number is None and _ARITHMETIC.search(given.text):
        return Verdict(Outcome.incorrect, "the final answer is a calculation that was not carried out", stated)
    return Verdict(Outcome.correct if _equal(given, reference) else Outcome.incorrect, extracted=stated)


def _right_side(text: str) -> str:
    sides = _EQUALS.split(text)
    return sides[1] if len(sides) == 2 and sides[1].strip() else text


def _as_words(text: str) -> str:
    """text in one spelling, for comparison as words; the case of LaTeX commands and of formulas is kept."""
    text = re.sub(r"^\((\w+)\)$", r"\1", text)
    return text if "\\" in text else text.casefold()


def _equal(given: _Reading, reference: _Reading) -> bool:
    if given.number and reference.number:
        return _same_number(given.number, reference.number)
    gold, target = _symbolic(reference), _symbolic(given)
    if gold is None or target is None:
        return False
    return bool(verify(gold, target, timeout_seconds=None, raise_on_error=True))


def _symbolic(reading: _Reading) -> Any | None:
    """The expression of a reading; a plain number's is made only when the other side turned out to be a formula."""
    if reading.number is None:
        return reading.expression
    return _expression(str(reading.number.value))


def _same_number(one: _Number, other: _Number) -> bool:
    """Exact equality; two units must agree up to a plural, a unit or a percent sign on one side only is ignored."""
    if one.unit and other.unit and _singular(one.unit) != _singular(other.unit):
        return False
    if one.percent == other.percent:
        return one.value == other.value
    percent, plain = (one, other) if one.percent else (other, one)
    return plain.value in (percent.value, percent.value / 100)


def _singular(unit: str) -> str:
    return unit.removesuffix("s").removesuffix("e")
