"""Grades answers to reasoning-gym's tasks by the tasks' own scorers, partial credit included.

An entry (its question, answer and metadata) is JSON, so that it fits where other tasks have their answer. Some scorers
trust what they read: four evaluate the answer as Python, five let sympy do so, and those get functions that read values
and arithmetic only; one takes anything but True for False. The entry's own answer has to score 1 before a lower score
counts against a completion. Scorers may hang, so grade untrusted text through `AnswerPool`.
"""

import ast
import json
import re
import sys
from functools import cache
from typing import Any

import reasoning_gym
import sympy
from reasoning_gym.factory import DATASETS

from lockstep.rl.verdict import Outcome, Verdict, of_credit
from lockstep.rl.verifiers.math.extraction import tagged_or_boxed

_FORMULA = re.compile(r"[\w\s+\-*/^().,=]*")
_NAMES = re.compile(r"[^\W\d]\w*")
_KNOWN = {
    *[
        "sin",
        "cos",
        "tan",
        "sec",
        "csc",
        "cot",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "exp",
        "log",
        "ln",
        "sqrt",
        "pi",
        "Abs",
    ]
}
_EVALUATING = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
_TRUTHS = ("true", "false")


class BadEntry(ValueError):
    """An entry by which nothing can be graded; the message says why, in one sentence."""


def grade(response: str, entry: str) -> Verdict:
    """The credit that a response earns: of its last `<answer>`, else of its last box, else of all of it.

    Ungradable if the entry is none, names no data set of reasoning-gym, or gives its own answer less than full credit.
    """
    try:
        found = _parsed(entry)
        variants = [_Scorer(found), _Scorer(_with_tuples(found))]
        scorer = next((one for one in variants if one.accepts_own_answer()), None)
    except BadEntry as error:
        return Verdict(Outcome.ungradable, str(error))
    if scorer is None:
        return Verdict(Outcome.ungradable, "the entry's own answer does not get full credit: was its metadata changed?")
    stated = tagged_or_boxed(response)
    if not stated:
        return Verdict(Outcome.incorrect, "no final answer", credit=0.0)
    try:
        return of_credit(scorer.credit(stated), stated)
    except Exception as error:  # the entry is sound, so it is the answer that the scorer cannot read
        return Verdict(Outcome.incorrect, f"the answer cannot be scored: {type(error).__name__}", stated, 0.0)


class _Scorer:
    """The score of answers to one entry."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self._entry = entry
        name = entry["metadata"]["source_dataset"]
        self._dataset = _dataset(name, json.dumps(entry.get("settings", {}), sort_keys=True))

    def accepts_own_answer(self) -> bool:
        """Whether the entry's answer gets full credit; those without one, or with an example, are taken as sound."""
        own = self._entry.get("answer")
        if not isinstance(own, str) or "example_answer" in self._entry["metadata"]:
            return True
        try:
            return self.credit(own) == 1
        except Exception:  # a damaged entry fails in any way
            return False

    def credit(self, answer: str) -> float:
        """From 0 to 1; whatever the scorer raises."""
        own = self._entry.get("answer")
        if isinstance(own, str) and own.casefold() in _TRUTHS and answer.casefold() not in _TRUTHS:
            return 0.0
        return min(1.0, max(0.0, float(self._dataset.score_answer(answer, self._entry))))


def _parsed(entry: str) -> dict[str, Any]:
    try:
        found = json.loads(entry)
        name = found["metadata"]["source_dataset"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadEntry(f"an entry is JSON with metadata.source_dataset, and this is not ({error!r})"[:300]) from error
    if name not in DATASETS:
        raise BadEntry(f"reasoning-gym has no data set {name!r}")
    return dict(found)


@cache
def _dataset(name: str, settings: str) -> Any:
    """A data set that scores and makes nothing, with what it reads answers by made safe."""
    try:
        dataset = reasoning_gym.create_dataset(name, **{**json.loads(settings), "size": 1, "seed": 0})
    except (TypeError, ValueError, AssertionError) as error:
        raise BadEntry(f"reasoning-gym's {name} cannot be made with {settings}: {error}") from error
    module = sys.modules[type(dataset).__module__]
    if name in _EVALUATING:
        vars(module)["eval"] = ast.literal_eval  # found before the builtin, in this module only
    safe = {"parse_expr": _arithmetic, "sympy": _Sympy(), "sp": _Sympy()}
    unsafe = (sympy, sympy.parse_expr)
    vars(module).update({name: value for name, value in safe.items() if vars(module).get(name) in unsafe})
    return dataset


class _Sympy:
    """sympy, but for `parse_expr`, which evaluates whatever it is given as Python."""

    def __getattr__(self, name: str) -> Any:
        return _arithmetic if name == "parse_expr" else getattr(sympy, name)


def _arithmetic(text: str, **named: Any) -> Any:
    """sympy's parse_expr for arithmetic over numbers, variables of one letter and the usual functions."""
    names = _NAMES.findall(text)
    unknown = [name for name in names if len(name) > 1 and name not in _KNOWN]
    if unknown or not _FORMULA.fullmatch(text) or re.search(r"\.\s*[^\W\d]", text):
        raise ValueError("not a formula")
    return sympy.parse_expr(text, **named)


def _with_tuples(value: Any) -> Any:
    """The value with tuples for lists: JSON has none, and some scorers compare with them."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value
