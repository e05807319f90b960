"""The tests of a code problem: assertions, or cases of standard input and output. Standard library only."""

import re
from dataclasses import dataclass

_BEHIND_A_NAME = re.compile(r"\W")


@dataclass(frozen=True)
class Case:
    """One test case: what a program reads from standard input, and what it must print."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CodeTests:
    """Either a program of assertions about a function, or cases of standard input and output, or both."""

    program: str = ""
    """Python that runs after the completion; where it defines `check`, `check(entry_point)` is called (HumanEval's
    form)."""
    entry_point: str = ""
    """Name of the function that is tested; empty for whole programs."""
    prefix: str = ""
    """What stands before the completion, as HumanEval's signature; a completion that defines the entry point itself
    replaces it."""
    cases: tuple[Case, ...] = ()


def tested_name(entry_point: str) -> str:
    """The name that a program has to define at its top for an entry point, as Solution for "Solution().twoSum".

    Its pattern is compiled where this module is imported: in forked processes it would take 0.5 ms of each.
    """
    return _BEHIND_A_NAME.split(entry_point, maxsplit=1)[0]
