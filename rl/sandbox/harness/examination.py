"""Runs the tests on a program and gives the verdict; the program runs in another process.

Tests of functions run here, and what they call is a `Remote`: arguments go to the program's process, results come back
as plain values (see `wire`). Equality, containment and truth of results are therefore those of Python's own types; an
object that cannot cross equals itself alone. The program can neither read a test nor change how it is judged.

Correct means that the tests ran to their end, called the program, and that the program was alive and well formed to the
end; whatever tests swallow, a program that ended, or sent what is no value, is incorrect.
"""

import ast
import builtins
import dis
import json
import os
import sys
import types
import unittest
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lockstep.data.tasks.code_tests import Case, CodeTests, tested_name
from lockstep.rl.sandbox import preamble
from lockstep.rl.sandbox.harness import comparison, pytest_subset
from lockstep.rl.sandbox.harness.proxy import ProgramFailed, Remote, Session, Unusable
from lockstep.rl.sandbox.harness.runs import Runs
from lockstep.rl.sandbox.harness.standard_streams import SHOWN, observe
from lockstep.rl.verdict import Outcome, Verdict

_FILE = "tests.py"
_PROGRAM_MODULES = ("solution", "main", "program")
"""Names by which tests in files of their own import what they test."""
_LONGEST_NUMBER = 100_000
"""Digits of an integer that tests may read and print; more take seconds, which a program could make them take."""


def examine(tests: CodeTests, runs: Runs) -> Verdict:
    """Runs all tests on the program."""
    if not tests.program and not tests.cases:
        return Verdict(Outcome.ungradable, "there are no tests: give a program of tests, or cases")
    if tests.program:
        verdict = _examine_functions(tests, runs)
        if verdict.outcome is not Outcome.correct:
            return verdict
    for number, case in enumerate(tests.cases, 1):
        if problem := _examine_case(case, runs):
            return Verdict(Outcome.incorrect, f"case {number} of {len(tests.cases)}: {problem}")
    return Verdict(Outcome.correct)


def _examine_functions(tests: CodeTests, runs: Runs) -> Verdict:
    sys.set_int_max_str_digits(_LONGEST_NUMBER)
    try:
        code = compile(comparison.with_tolerance(tests.program), _FILE, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Verdict(Outcome.ungradable, f"the tests do not compile: {error}")
    session = Session(runs)
    if problem := session.ready():
        return Verdict(Outcome.incorrect, problem)
    try:
        names = _Names(tests, code, session)
    except ProgramFailed:
        return Verdict(Outcome.incorrect, session.failure)
    if problem := names.lacking_entry_point:
        return Verdict(Outcome.incorrect, problem)
    return _judged(session, lambda: names.lacking(code), lambda: _run_tests(code, names.found, tests))


class _Names:
    """What tests find under each name: their own, the data set's, the program's, and those of `preamble`."""

    def __init__(self, tests: CodeTests, code: types.CodeType, session: Session) -> None:
        self._root = tested_name(tests.entry_point)
        self.found = _names_of_prefix(tests)
        self.found |= {comparison.CLOSE: comparison.close, "__file__": _FILE}
        free = {name for name in _free_names(code) if name and name not in self.found and name not in vars(builtins)}
        self._asked = {name for name in free if not self._is_trusted(name)} | {self._root} - {""}
        for name in self._asked:
            with suppress(Exception):
                self.found[name] = session.ask("item", 0, name)
        self.found |= {name: preamble.NAMES[name] for name in free - set(self.found) if self._is_trusted(name)}
        for name in _PROGRAM_MODULES:
            sys.modules.setdefault(name, _ProgramModule(name, session))

    def _is_trusted(self, name: str) -> bool:
        """Tests that use `math` or `isclose` without importing it mean Python's, whatever the program calls so."""
        known = preamble.NAMES.get(name)
        return known is not None and (bool(self._root) or isinstance(known, types.ModuleType))

    @property
    def lacking_entry_point(self) -> str:
        """Why the entry point cannot be called, or an empty string."""
        lacks = self._root and not isinstance(self.found.get(self._root), Remote)
        return f"the program does not define {self._root}" if lacks else ""

    def lacking(self, code: types.CodeType) -> str:
        """Where no entry point is given: a name that the tests read and the program does not define as they need it."""
        if self._root:
            return ""
        read, bound = _globals_of(code)
        missing = read - bound - set(vars(builtins))
        return next((name for name in sorted(missing) if not callable(self.found.get(name))), "")


def _globals_of(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Global names that code reads, and those that it binds."""
    inner = [_globals_of(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    steps = [(step.opname.partition("_"), step.argval) for step in dis.get_instructions(code)]
    named = [(kind, name) for (kind, _, where), name in steps if where in ("NAME", "GLOBAL")]
    read = {name for kind, name in named if kind == "LOAD"}.union(*(names for names, _ in inner))
    return read, {name for kind, name in named if kind == "STORE"}.union(*(names for _, names in inner))


class _ProgramModule(types.ModuleType):
    """What `from solution import f` finds in tests."""

    def __init__(self, name: str, session: Session) -> None:
        super().__init__(name)
        self._session = session

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self._session.ask("item", 0, name)
        except KeyError:
            self._session.fail(f"the program does not define {name}")


def _names_of_prefix(tests: CodeTests) -> dict[str, Any]:
    """What the data set defines before the completion: HumanEval's tests call helpers that stand there."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    for source in (tests.prefix, tests.prefix + "    pass\n"):
        with suppress(Exception):
            exec(compile(source, "prefix.py", "exec"), module.__dict__)
            break
    return module.__dict__


def _free_names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*(_free_names(part) for part in inner))


def _run_tests(code: types.CodeType, names: dict[str, Any], tests: CodeTests) -> None:
    sys.modules["pytest"] = pytest_subset.module(names)
    exec(code, names)
    candidate = _reached(tests.entry_point, names) if tests.entry_point else None
    if candidate is not None and callable(check := names.get("check")) and not isinstance(check, Remote):
        check(candidate)
    _run_unittest(names)
    if any(name.startswith(("test", "Test")) for name in names):
        pytest_subset.run(names, _FILE, spared=_names_read(tests.program), candidate=candidate)


def _run_unittest(names: dict[str, Any]) -> None:
    cases = [kind for kind in names.values() if isinstance(kind, type) and issubclass(kind, unittest.TestCase)]
    if not cases:
        return
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    result = unittest.TestResult()
    unittest.TestSuite(load(kind) for kind in cases).run(result)
    if problems := result.failures + result.errors:
        raise AssertionError(problems[0][1].strip().splitlines()[-1])


def _names_read(source: str) -> set[str]:
    """Names that a source reads somewhere: a test function among them is called by the tests themselves."""
    nodes = ast.walk(ast.parse(source)) if "test" in source else ()
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _reached(entry_point: str, names: dict[str, Any]) -> Any:
    """A function by its name, or a method as in "Solution().twoSum"."""
    first, *attributes = entry_point.split(".")
    found = names[first.removesuffix("()")]
    found = found() if first.endswith("()") else found
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


def _judged(session: Session, lacking: Callable[[], str], run: Callable[[], None]) -> Verdict:
    """What the end of the tests says; before the first call an error is their own, unless the program is `lacking`."""
    reason = _reason(session, run)
    if session.unusable and not session.failure:
        return Verdict(Outcome.ungradable, session.unusable)
    if session.calls == 0 and not session.failure:
        if reason and (name := lacking()):
            return Verdict(Outcome.incorrect, f"the program does not define {name}: {reason}"[:SHOWN])
        return Verdict(Outcome.ungradable, reason or "the tests never called the program")
    return Verdict(Outcome.incorrect, reason) if reason else Verdict(Outcome.correct)


def _reason(session: Session, run: Callable[[], None]) -> str:
    """Runs the tests; returns why they failed, empty where they passed."""
    reason = ""
    try:
        run()
    except (ProgramFailed, Unusable):
        pass
    except pytest_subset.Unsupported as error:
        session.unusable = str(error)
    except AssertionError as error:
        reason = f"an assertion failed: {_text(error)}".removesuffix(": ")
    except SystemExit as end:
        reason = f"the tests ended with {end.code!r}" if end.code not in (None, 0) else ""
    except BaseException as error:
        reason = f"the tests raised {type(error).__name__}: {_text(error)}"
    return (session.failure or reason)[:SHOWN]


def _text(error: BaseException) -> str:
    """Of an error whose arguments may be anything that the program has made of them."""
    try:
        return str(error)
    except Exception:
        return "(no text)"


def _examine_case(case: Case, runs: Runs) -> str:
    """Empty if the program prints what the case expects, else what is wrong."""
    seen = observe(case.stdin, runs)
    if seen.problem:
        return f"the program {seen.problem}"
    if comparison.same_output(seen.output, case.stdout):
        return ""
    return f"printed {seen.output[:SHOWN]!r}, expected {case.stdout[:SHOWN]!r}"


def read_tests(descriptor: int) -> CodeTests | str:
    """Reads the tests in a file descriptor, which is closed; a string is the input of a program that is only run."""
    with os.fdopen(descriptor, "rb") as file:
        given = json.loads(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))
    if isinstance(given, str):
        return given
    return CodeTests(**{**given, "cases": tuple(Case(**case) for case in given["cases"])})
