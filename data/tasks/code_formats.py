"""Reads code problems from rows of HumanEval, MBPP, APPS and LiveCodeBench into `CodeTests`.

Data sets are not trusted and nothing of them is run here: LiveCodeBench's private tests are a pickle, which is read
by an unpickler that refuses every class and function.
"""

import ast
import base64
import io
import pickle
import zlib
from collections.abc import Sequence
from typing import Any

from lockstep.data.json_text import Bad, parsed_json
from lockstep.data.row_reader import BadRow, Row
from lockstep.data.tasks.code_tests import Case, CodeTests
from lockstep.data.tasks.problem import Problem

_LONGEST_CASES = 1 << 28
"""Bytes that private tests may unpack to."""


def humaneval(index: int, row: Row) -> Problem:
    """HumanEval and HumanEval+: `prompt` begins a program; `test` defines `check` (Chen et al., arXiv:2107.03374)."""
    prompt, solution = row.text("prompt"), row.text("canonical_solution")
    if not _filled(row, "test"):
        raise row.bad("test", _NO_TESTS)
    tests = CodeTests(row.text("test"), row.text("entry_point"), prefix=prompt)
    return Problem(index, prompt, solution, tests, solution)


def mbpp(index: int, row: Row) -> Problem:
    """MBPP: `text` (or `prompt`, sanitized) and a `test_list` of assertions (Austin et al. 2021, arXiv:2108.07732).

    MBPP+ has an extended suite in `test` (Liu et al. 2023, arXiv:2305.01210), which decides; the prompt shows the list.
    """
    question = row.text("text") if row.has("text") else row.text("prompt")
    code, asserts = row.text("code").replace("\r\n", "\n").strip(), row.texts("test_list")
    setup = [row.text("test_setup_code")] if row.has("test_setup_code") else []
    setup += row.texts("test_imports") if row.has("test_imports") else []
    suite = [row.text("test")] if row.has("test") else asserts
    if not any(part.strip() for part in suite):
        raise row.bad("test_list", _NO_TESTS)
    tests = CodeTests("\n".join([*setup, *suite]), _tested(code, asserts or suite))
    return Problem(index, question, code, tests, code, "\n".join(asserts))


_NO_TESTS = "has no test, and a problem without tests cannot be judged: leave the row out"


def _tested(code: str, asserts: Sequence[str]) -> str:
    """The function of the program that the assertions call; empty where that cannot be told."""
    try:
        defined = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        calls = [node.func for node in ast.walk(ast.parse("\n".join(asserts))) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError):
        return ""
    called = {call.id for call in calls if isinstance(call, ast.Name)}
    return next((name for name in reversed(defined) if name in called), "")


def apps(index: int, row: Row) -> Problem:
    """APPS: `input_output` has `inputs`, `outputs` and perhaps `fn_name` (Hendrycks et al. 2021, arXiv:2105.09938).

    Its fields are JSON in text, and an empty text where a problem has none: no starter, no solution, or no test.
    """
    starter = row.text("starter_code") if row.has("starter_code") else ""
    solutions = row.checked("solutions", row.json("solutions"), list) if _filled(row, "solutions") else []
    solution = solutions[0] if solutions and isinstance(solutions[0], str) else ""
    return Problem(index, row.text("question"), solution, input_output(row, "input_output", starter), solution, starter)


def _filled(row: Row, name: str) -> bool:
    """Whether a field says more than blanks."""
    return row.has(name) and not (isinstance(row.values[name], str) and not row.values[name].strip())


def input_output(row: Row, name: str, starter: str = "") -> CodeTests:
    """The tests in APPS's object of `inputs` and `outputs`.

    Raises:
        BadRow: names the field.
    """
    value = row.json(name) if _filled(row, name) else None
    if not value:
        raise row.bad(name, _NO_TESTS)
    found = Row(f"{row.place}, {name}", row.checked(name, value, dict))
    inputs, outputs = found.items("inputs"), found.items("outputs")
    if not inputs and not outputs:
        raise row.bad(name, _NO_TESTS)
    if len(inputs) != len(outputs):
        raise row.bad(
            name, f"has {len(inputs)} inputs and {len(outputs)} outputs, and needs as many of one as the other"
        )
    if found.has("fn_name"):
        calls = [(found.checked("inputs", given, list), wanted) for given, wanted in zip(inputs, outputs, strict=True)]
        return calling(found.text("fn_name"), calls, starter)
    return CodeTests(cases=tuple(Case(_stream(i), _stream(o)) for i, o in zip(inputs, outputs, strict=True)))


def calling(function: str, calls: Sequence[tuple[list[Any], Any]], starter: str) -> CodeTests:
    """Assertions that a function, or a method of the starter's class Solution, returns what is wanted."""
    is_method = "class Solution" in starter
    asserts = [_assertion(given, wanted) for given, wanted in calls]
    begin = f"candidate = Solution().{function}" if is_method else f"candidate = {function}"
    return CodeTests("\n".join([begin, *asserts]), "" if is_method else function)


def _assertion(given: list[Any], wanted: Any) -> str:
    """APPS wraps some results into a list of one, so that both the list and what is in it are right."""
    if isinstance(wanted, list) and len(wanted) == 1:
        return f"assert (result := candidate(*{given!r})) == {wanted!r} or result == {wanted[0]!r}"
    return f"assert candidate(*{given!r}) == {wanted!r}"


def _stream(value: Any) -> str:
    """A text as it is, a list as its lines."""
    return "\n".join(map(str, value)) + "\n" if isinstance(value, list) else str(value)


def livecodebench(index: int, row: Row) -> Problem:
    """LiveCodeBench: `question_content`, `public_test_cases`, `private_test_cases` (Jain et al., arXiv:2403.07974)."""
    starter = row.text("starter_code") if row.has("starter_code") else ""
    cases = [Row(f"{row.place}, {name}", case) for name in _CASES for case in _cases(row, name)]
    if not cases:
        raise row.bad("public_test_cases", "has no case, and neither has 'private_test_cases'")
    if all(case.text("testtype") == "stdin" for case in cases):
        tests = CodeTests(cases=tuple(Case(case.text("input"), case.text("output")) for case in cases))
    else:
        calls = [(_arguments(case), case.json("output")) for case in cases]
        tests = calling(row.part("metadata").text("func_name"), calls, starter)
    return Problem(index, row.text("question_content"), "", tests, examples=starter)


_CASES = ("public_test_cases", "private_test_cases")


def _cases(row: Row, name: str) -> list[dict[str, Any]]:
    if not _filled(row, name):
        return []
    value = row.values[name]
    if isinstance(value, str) and not value.lstrip().startswith("["):
        value = parsed_json(_unpacked(row, name))
    else:
        value = row.json(name)
    if isinstance(value, Bad):
        raise row.bad(name, f"must be JSON: {value.reason}")
    return [row.checked(name, case, dict) for case in row.checked(name, value, list)]


def _arguments(case: Row) -> list[Any]:
    """One argument a line, each as JSON."""
    found = [parsed_json(line) for line in case.text("input").split("\n") if line.strip()]
    bad = next((value for value in found if isinstance(value, Bad)), None)
    if bad is not None:
        raise case.bad("input", f"must have JSON on each line: {bad.reason}")
    return found


class _PlainPickle(pickle.Unpickler):
    """Reads texts, numbers and containers; whatever names a class or a function is refused, so that nothing is run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only text may be in it")


def _unpacked(row: Row, name: str) -> str:
    """JSON out of base64 of zlib of a pickled text."""
    try:
        unpacking = zlib.decompressobj()
        packed = base64.b64decode(row.text(name), validate=True)
        content = unpacking.decompress(packed, _LONGEST_CASES)
        if not unpacking.eof:
            raise row.bad(name, f"is cut off, or unpacks to more than {_LONGEST_CASES >> 20} MiB")
        text = _PlainPickle(io.BytesIO(content)).load()
    except BadRow:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise row.bad(name, f"is neither JSON nor a packed text ({error})") from error
    found: str = row.checked(name, text, str)
    return found
