"""The trusted side of a sandbox: runs the tests and gives the verdict; the program runs in another process.

Tests of functions run here, and what they call is a `Remote`: arguments go to the program's process, results come back
as plain values (see `wire`). Equality, containment and truth of results are therefore those of Python's own types; an
object that cannot cross equals itself alone. The program can neither read a test nor change how it is judged.

Correct means that the tests ran to their end, called the program, and that the program was alive and well formed to the
end; whatever tests swallow, a program that ended, or sent what is no value, is incorrect.
"""

import builtins
import json
import os
import re
import selectors
import sys
import types
import unittest
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from lockstep.data.tasks.code_tests import Case, CodeTests
from lockstep.rl.sandbox.proxy import SHOWN, ProgramFailed, Remote, Session, Start, Unusable
from lockstep.rl.verdict import Outcome, Verdict

_PIECE = 1 << 16


@dataclass(frozen=True)
class Observation:
    """What a program printed, and how it failed, as "ended with exit code 1 …"; empty where it did not."""

    output: str
    problem: str = ""


def examine(tests: CodeTests, start: Start, longest: int) -> Verdict:
    """Runs all tests on the program that `start` runs; `longest` bounds outputs and values, in bytes."""
    if not tests.program and not tests.cases:
        return Verdict(Outcome.ungradable, "there are no tests: give a program of tests, or cases")
    if tests.program:
        verdict = _examine_functions(tests, start, longest)
        if verdict.outcome is not Outcome.correct:
            return verdict
    for number, case in enumerate(tests.cases, 1):
        if problem := _examine_case(case, start, longest):
            return Verdict(Outcome.incorrect, f"case {number} of {len(tests.cases)}: {problem}")
    return Verdict(Outcome.correct)


def _examine_functions(tests: CodeTests, start: Start, longest: int) -> Verdict:
    try:
        code = compile(tests.program, "tests.py", "exec")
    except (SyntaxError, ValueError) as error:
        return Verdict(Outcome.ungradable, f"the tests do not compile: {error}")
    session = Session(start, longest)
    if problem := session.ready():
        return Verdict(Outcome.incorrect, problem)
    names = _names_of_prefix(tests)
    root = re.split(r"\W", tests.entry_point, maxsplit=1)[0]
    for name in {root} | _free_names(code) - set(names) - set(vars(builtins)) - {""}:
        with suppress(Exception):
            names[name] = session.ask("item", 0, name)
    if root and not isinstance(names.get(root), Remote):
        return Verdict(Outcome.incorrect, f"the program does not define {root}")
    return _judged(session, lambda: _run_tests(code, names, tests.entry_point))


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


def _run_tests(code: types.CodeType, names: dict[str, Any], entry_point: str) -> None:
    exec(code, names)
    if entry_point and callable(check := names.get("check")) and not isinstance(check, Remote):
        check(_reached(entry_point, names))
    cases = [kind for kind in names.values() if isinstance(kind, type) and issubclass(kind, unittest.TestCase)]
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    result = unittest.TestResult()
    unittest.TestSuite(load(kind) for kind in cases).run(result)
    if problems := result.failures + result.errors:
        raise AssertionError(problems[0][1].strip().splitlines()[-1])


def _reached(entry_point: str, names: dict[str, Any]) -> Any:
    """A function by its name, or a method as in "Solution().twoSum"."""
    first, *attributes = entry_point.split(".")
    found = names[first.removesuffix("()")]
    found = found() if first.endswith("()") else found
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


def _judged(session: Session, run: Callable[[], None]) -> Verdict:
    """What the end of the tests says. Before the first call an error is the tests' own."""
    try:
        run()
        reason = ""
    except (ProgramFailed, Unusable):
        reason = session.failure
    except AssertionError as error:
        reason = f"an assertion failed: {error}"[:SHOWN].removesuffix(": ")
    except SystemExit as end:
        reason = f"the tests ended with {end.code!r}" if end.code not in (None, 0) else ""
    except BaseException as error:
        reason = f"the tests raised {type(error).__name__}: {error}"[:SHOWN]
    reason = session.failure or reason
    if session.unusable and not session.failure:
        return Verdict(Outcome.ungradable, session.unusable)
    if session.calls == 0:
        return Verdict(Outcome.ungradable, reason or "the tests never called the program")
    return Verdict(Outcome.incorrect, reason) if reason else Verdict(Outcome.correct)


def observe(stdin: str, start: Start, longest: int) -> Observation:
    """Runs the program on this input; returns what it printed. More than `longest` bytes of output end it."""
    pipes = [os.pipe() for _ in range(3)]
    (input_read, input_write), (output_read, output_write), (errors_read, errors_write) = pipes
    ended = start([input_read, output_write, errors_write])
    for descriptor in (input_read, output_write, errors_write):
        os.close(descriptor)
    output, errors = _converse(input_write, stdin.encode(), (output_read, errors_read), longest)
    printed = output.decode(errors="replace")
    if len(output) > longest:
        return Observation(printed, f"printed more than {longest} bytes")
    if problem := ended():
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        return Observation(printed, f"{problem} {''.join(last)}"[:SHOWN].strip())
    return Observation(printed)


def _examine_case(case: Case, start: Start, longest: int) -> str:
    """Empty if the program prints what the case expects, else what is wrong."""
    seen = observe(case.stdin, start, longest)
    if seen.problem:
        return f"the program {seen.problem}"
    printed = seen.output
    return "" if same_output(printed, case.stdout) else f"printed {printed[:SHOWN]!r}, expected {case.stdout[:SHOWN]!r}"


def _converse(stdin: int, text: bytes, outputs: tuple[int, int], longest: int) -> tuple[bytes, bytes]:
    """Writes the input while it reads both outputs, until they close or one is over the longest. Closes all three."""
    collected = {descriptor: bytearray() for descriptor in outputs}
    with selectors.DefaultSelector() as selector:
        os.set_blocking(stdin, False)
        selector.register(stdin, selectors.EVENT_WRITE)
        for descriptor in outputs:
            selector.register(descriptor, selectors.EVENT_READ)
        while set(outputs) & set(selector.get_map()):
            for key, _ in selector.select():
                if key.fd == stdin:
                    text = _written(stdin, text)
                    done = not text
                else:
                    piece = os.read(key.fd, _PIECE)
                    collected[key.fd] += piece
                    done = not piece or len(collected[key.fd]) > longest
                if done:
                    selector.unregister(key.fd)
                    os.close(key.fd)
        for key in list(selector.get_map().values()):
            os.close(key.fd)
    return bytes(collected[outputs[0]]), bytes(collected[outputs[1]])


def _written(stdin: int, text: bytes) -> bytes:
    """What is left to write; nothing if nobody reads."""
    try:
        return text[os.write(stdin, text[:_PIECE]) :] if text else b""
    except BrokenPipeError:
        return b""


def same_output(printed: str, expected: str) -> bool:
    """Whether outputs are equal by lines, up to space around words and at the end, decimals by value (1.0 = 1.00)."""
    ours, theirs = (text.rstrip().split("\n") for text in (printed, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(ours: str, theirs: str) -> bool:
    one, other = ours.split(), theirs.split()
    return one == other or (len(one) == len(other) and all(map(_same_word, one, other)))


def _same_word(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    with suppress(InvalidOperation):
        return "." in theirs and Decimal(ours) == Decimal(theirs)
    return False


def read_tests(descriptor: int) -> CodeTests | str:
    """Reads the tests in a file descriptor, which is closed; a string is the input of a program that is only run."""
    with os.fdopen(descriptor, "rb") as file:
        given = json.loads(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))
    if isinstance(given, str):
        return given
    return CodeTests(**{**given, "cases": tuple(Case(**case) for case in given["cases"])})
