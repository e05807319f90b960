"""A problem: the question, and the answer or tests that decide whether a completion is right."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from lockstep.data.tasks.code_tests import CodeTests


@dataclass(frozen=True)
class Problem:
    """A question, its answer, and its number in its split."""

    index: int
    question: str
    answer: str
    tests: CodeTests | None = None
    """Of a program; its verdict is that of the tests and not of the answer."""
    solution: str = ""
    """How the answer is found, as the model should write it, answer included; empty where that is not known."""
    examples: str = ""
    """Tests that the prompt may show."""
    system: str = ""
    """What stands before the question in the data."""
    entry: Mapping[str, Any] | None = field(default=None, compare=False)
    """reasoning-gym's own form of it, by which its graders give partial credit."""

    pass_rate: float | None = field(default=None, compare=False)
    """The share of completions that were correct when it was measured; None where it was not, NaN where none could be
    graded."""

    @property
    def digest(self) -> str:
        """A digest of what is asked and what is right, 32 hex digits, by which measurements find a problem again."""
        parts = [self.system, self.question, self.answer]
        if tests := self.tests:
            parts += [tests.program, tests.entry_point, tests.prefix]
            parts += [text for case in tests.cases for text in (case.stdin, case.stdout)]
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

    @property
    def program(self) -> str:
        """The solution of a code problem with what stands before it."""
        return (self.tests.prefix if self.tests else "") + self.solution


def entry_text(entry: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> str:
    """Serialize an entry of reasoning-gym as the reference answer that its grader takes.

    Args:
        settings: arguments of the data set that made it, for the scorers that depend on them.
    """
    return json.dumps({**entry, "settings": settings or {}}, default=str)
