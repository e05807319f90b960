r"""Extracts the final answer of a response: what it states as its answer, never a number that merely occurs in it.

Thoughts are no answer, a response that ends within one has none, and where there is an `<answer>…</answer>`, the last
one holds it. Marked answers come first: `\boxed{...}`, `#### x`, "the answer is x" (or "Answer: x", or a heading
"Final answer" above it). Of several the last one wins, whichever its mark; beside others, `####` and "the answer is"
count only where a number or a formula follows at once, because they also begin headings and sentences. Without a mark,
the answer is a response that is one expression and nothing else; else the right side of the last `=` where it ends its
sentence and no later text has numbers; else the only number in plain prose. Otherwise there is none.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from lockstep.data.tasks.boxed import boxes, last_box
from lockstep.rl.verifiers.math.normalize import clean
from lockstep.rl.verifiers.math.numbers import NUMBER, is_prose, number_of
from lockstep.rl.verifiers.math.parsing import EQUALS, is_words, option_of
from lockstep.rl.verifiers.thoughts import after_thoughts

_BOLD = re.compile(r"(?<![\w*)}\]])(\*{1,3}|__)(?=[^\s*])([^*\n]+?)\1(?![\w*])")
_CONNECTED = re.compile(
    r"(?:[\s$]|\\[()\[\]]|\\quad|[a-zA-Z](?:_\{?\w\}?)?\s*=)*"
    r"(?:[,;]|\\text\s*\{\s*(?:and|or)\s*\}|\band\b|\bor\b)"
    r"(?:[\s$]|\\[()\[\]]|\\quad|\band\b|\bor\b|[a-zA-Z](?:_\{?\w\}?)?\s*=)*"
)
_HASHES = re.compile(r"#{4}")
_DISPLAY = r"(?:\\\[|\$\$)?\s*+"
_PHRASE = re.compile(
    r"\b(?:answers?|(?:correct|right|best)\s(?:option|choice))(?:\s(?:to|for)\s[^.\n:=]{1,80}?)?\s*+"
    r"(?:(?:is|are|(?:would|should|must|will)\s+be|equals|comes\s+(?:out\s+)?to)\b(?:\s+(?:therefore|thus|then|hence|simply"
    rf"|just|now|indeed|equal\s+to)\b)?|:|=)\s*+:?\s*+{_DISPLAY}"
    rf"|^[ \t#]*+(?:the\s)?(?:final\s)?answer[ \t]*+\n\s*+{_DISPLAY}",
    re.IGNORECASE | re.MULTILINE,
)
_SCALES = "hundred|thousand|million|billion|trillion|dozen|half|halves|third|thirds|quarter|quarters"
_CLAUSE_END = re.compile(
    r"[.;!?](?=\s|$) | ,?\s+(?:because|since|as|which|where)\b | ,\s+(?:not|so|but|rather|instead)\b"
    rf"| (?<=[0-9$}}%])\s+(?!(?i:{_SCALES})\b)(?=[A-Z][a-z])",
    re.VERBOSE,
)
_SENTENCE_END = re.compile(r"[.;](?=\s|$)|\n|$")
_MATH_SPAN = re.compile(r"(?P<before>[^$\\]*)(?:\$+(?P<dollars>[^$]+)\$+|\\\((?P<parens>.+?)\\\))(?P<after>[^$\\]*)")
_MARKERS_TRIED = 8
_LONGEST = 10_000
"""Characters of an answer, of a response that is one as a whole, and of the end where an equation is looked for."""


@dataclass(frozen=True)
class Stated:
    """An answer as the response writes it, and its position in the text."""

    text: str
    place: int


def final_answer(response: str) -> str | None:
    """The answer that the response states, by the rules of this module; None if it states none."""
    text, tagged = _final_part(response)
    stated = _marked(text) or next((found for rule in UNMARKED.values() if (found := rule(text))), None)
    if stated:
        return stated.text
    return (text.strip() or None) if tagged else None


def candidates(response: str) -> dict[str, str]:
    """The answer that each rule alone would find, by the rule's name; rules that find nothing are left out."""
    text, tagged = _final_part(response)
    found = {name: stated.text for name, rule in (MARKED | UNMARKED).items() if (stated := rule(text))}
    return found | ({"tag": text.strip()} if tagged and text.strip() else {})


def tagged_or_boxed(response: str) -> str:
    """For answers of any form: what the last `<answer>` holds, else the last box, else all after the thoughts."""
    text, tagged = _final_part(response)
    box = None if tagged else _boxed(text)
    return box.text if box else text.strip()


def boxed_list(response: str) -> str | None:
    """The last boxes that only commas, "and" and "or" separate, joined as one list; None if there is only one."""
    text, _ = _final_part(response)
    every = sorted(boxes(text), key=lambda box: box.begin)
    found: list[str] = []
    for place in range(len(every) - 1, -1, -1):
        box = every[place]
        found.insert(0, text[box.start : box.stop].strip())
        between = text[every[place - 1].end : box.begin] if place else ""
        if len(between) > 60 or not _CONNECTED.fullmatch(between):
            break
    return ", ".join(found) if len(found) > 1 else None


def _final_part(response: str) -> tuple[str, bool]:
    """What follows the thoughts, narrowed to the last `<answer>` if there is one, and whether there was."""
    text = after_thoughts(response) or ""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    tagged = start >= 0
    return _BOLD.sub(r"\2", text[start + len("<answer>") : end] if tagged else text), tagged


def _marked(text: str) -> Stated | None:
    """The last marked answer that is one beyond doubt; without any, the last after `####`, else after a phrase."""
    box, *others = (rule(text) for rule in MARKED.values())
    certain = [stated for stated in others if stated and _is_direct(stated.text)]
    if box or certain:
        return max([*certain, *([box] if box else [])], key=lambda stated: stated.place)
    return next((stated for stated in others if stated), None)


def _boxed(text: str) -> Stated | None:
    """The content of the last box that closes and holds something; of nested boxes, the inner one."""
    box = last_box(text)
    return Stated(text[box.start : box.stop].strip(), box.stop) if box else None


def _after_hashes(text: str) -> Stated | None:
    return _last_clause(_HASHES, text)


def _after_phrase(text: str) -> Stated | None:
    return _last_clause(_PHRASE, text)


def _last_clause(marker: re.Pattern[str], text: str) -> Stated | None:
    """What follows the last marker behind which a number or a formula stands; behind none, what follows the last."""
    ends = [match.end() for match in marker.finditer(text)][-_MARKERS_TRIED:]
    found = [clause for end in reversed(ends) if (clause := _clause(text, end))]
    return next((stated for stated in found if _is_direct(stated.text)), found[0] if found else None)


def _clause(text: str, start: int) -> Stated | None:
    """From start to the end of the sentence or its reasons; of prose with one $formula$, that. None where a box is."""
    line_end = text.find("\n", start)
    line = text[start : line_end if line_end >= 0 else len(text)].strip()
    clause = _CLAUSE_END.split(line, maxsplit=1)[0].strip()
    if r"\boxed" in clause:
        return None
    span = _MATH_SPAN.fullmatch(clause)
    if span and is_prose(span["before"]) and is_prose(span["after"]):
        return Stated((span["dollars"] or span["parens"]).strip(), start)
    clause = clause.rstrip("$ ")
    return Stated(clause, start) if clause else None


def _is_direct(stated: str) -> bool:
    """Whether it is a number, a formula or the letter of a choice, and not prose that holds one."""
    text = clean(stated[:_LONGEST])
    if number_of(text):
        return NUMBER.match(text) is not None
    return bool(text) and (not is_words(text) or option_of(text) is not None)


def _bare(text: str) -> Stated | None:
    """The whole response, if it is one expression, one equation or one word."""
    text = text.strip()
    whole = len(text) <= _LONGEST and _is_expression(text) and r"\boxed" not in text and len(EQUALS.findall(text)) < 2
    return Stated(text, 0) if whole else None


def _after_equals(text: str) -> Stated | None:
    """The right side of the last equation, if it is a number or an expression ending the text, with no number later."""
    text = text[-_LONGEST:]
    equals = list(EQUALS.finditer(text))
    if not equals:
        return None
    tail = text[equals[-1].end() :]
    end = _SENTENCE_END.search(tail, len(tail) - len(tail.lstrip()))
    side, rest = (tail[: end.start()].strip(), tail[end.end() :].strip()) if end else (tail, "")
    usable = number_of(clean(side)) is not None or (not rest and _is_expression(side))
    return Stated(side, equals[-1].end()) if usable and not re.search("[0-9]", rest) else None


def _only_number(text: str) -> Stated | None:
    """The one number of a response that is otherwise plain prose."""
    if len(text) > _LONGEST:
        return None
    text = clean(text)
    text = text.rstrip("!") if " " in text else text
    found = NUMBER.search(text)
    return Stated(found[0].strip(), found.start()) if found and number_of(text) else None


def _is_expression(text: str) -> bool:
    single_word = re.fullmatch(r"\(?[\w:]+\)?\.?", text) is not None
    return bool(text) and not re.search(r"[\n;]", text) and (single_word or not is_words(clean(text)))


MARKED: dict[str, Callable[[str], Stated | None]] = {"boxed": _boxed, "hashes": _after_hashes, "phrase": _after_phrase}
UNMARKED: dict[str, Callable[[str], Stated | None]] = {
    "bare": _bare,
    "equation": _after_equals,
    "lone number": _only_number,
}
RULES = (*MARKED, *UNMARKED, "tag")
"""Names of all rules, in their order."""
