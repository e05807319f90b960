"""Shapes of problems: what people's files say arrives as question, answer, solution and tests."""

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.data.row_reader import BadRow, Row
from lockstep.data.tasks.boxed import last_boxed
from lockstep.data.tasks.code_tests import Case, CodeTests
from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.problem_formats import read_problem, read_problems

DATASETS = Path(__file__).parents[4] / "shared" / "datasets"
HUMANEVAL = DATASETS / "humaneval" / "HumanEval.jsonl.gz"


def problem(values: dict[str, Any], **fields: str) -> Problem:
    return read_problem(0, Row("f.jsonl:7", values), fields)


def test_gsm8k_gives_the_answer_and_the_work_without_the_calculator() -> None:
    found = problem({"question": "q", "answer": "3*4=<<3*4=12>>12 eggs.\n#### 1,212"})
    assert (found.answer, found.solution) == ("1,212", "3*4=12 eggs.\n#### 1,212")
    assert problem({"question": "q", "answer": " 12 "}) == Problem(0, "q", "12")


def test_math_takes_the_last_box_or_the_answer() -> None:
    rows = {"problem": "p", "level": "Level 5", "type": "Algebra"}
    worked = r"First \boxed{7}. No: $\boxed{\frac{1}{\sqrt{2}}}$."
    assert problem(rows | {"solution": worked}) == Problem(0, "p", r"\frac{1}{\sqrt{2}}", solution=worked)
    assert problem(rows | {"solution": worked, "answer": "8"}).answer == "8"


def test_aime_has_numbers_and_capitals() -> None:
    for row in (
        {"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 73},
        {"id": 60, "problem": "p", "solution": "s", "answer": "73", "year": "2024"},
    ):
        assert problem(row) == Problem(0, "p", "73", solution="s")
    assert problem({"question": "p", "answer": 73}) == Problem(0, "p", "73")


def test_messages_give_question_system_and_truth() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    row = {"data_source": "math_dapo", "prompt": turns, "ability": "MATH", "reward_model": {"ground_truth": "34"}}
    assert problem(row) == Problem(0, "q", "34", system="s")
    assert problem(row | {"prompt": turns[1:]}) == Problem(0, "q", "34")
    code = {"ground_truth": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})}
    assert problem(row | {"reward_model": code}).tests == CodeTests(cases=(Case("1\n", "2\n"),))


def test_mbpp_finds_the_function_that_the_tests_call() -> None:
    row = {
        "task_id": 11,
        "text": "Write f.",
        "code": "def g(x):\r\n  return x\r\ndef f(x):\r\n  return g(x)",
        "test_list": ["assert f(1) == 1", "assert f((2)) == 2"],
        "test_setup_code": "import math",
        "challenge_test_list": [],
    }
    found = problem(row)
    assert found.tests == CodeTests("import math\nassert f(1) == 1\nassert f((2)) == 2", "f")
    assert found.examples == "assert f(1) == 1\nassert f((2)) == 2"
    assert found.solution == "def g(x):\n  return x\ndef f(x):\n  return g(x)"
    sanitized = {
        "prompt": "Write f.",
        "code": row["code"],
        "test_imports": ["import math"],
        "test_list": ["assert f(1)"],
    }
    assert problem(sanitized).tests == CodeTests("import math\nassert f(1)", "f")
    assert problem(row | {"code": "def f(:"}).tests == CodeTests(found.tests.program)


MBPP_PLUS = {
    "prompt": "Write a function to double a number.",
    "code": "def double(x):\n    return 2 * x",
    "source_file": "own",
    "test_imports": [],
    "test_list": ["assert double(2) == 4"],
    "test": "for i, o in [(2, 4), (3, 6), (-5, -10)]:\n    assert double(i) == o\n",
}


def test_the_extended_suite_of_mbpp_plus_decides_and_the_list_is_shown() -> None:
    found = problem(MBPP_PLUS)
    assert found.tests == CodeTests(MBPP_PLUS["test"], "double")
    assert found.examples == "assert double(2) == 4"
    assert run(found.tests, found.program)
    assert not run(found.tests, "def double(x): return 4")
    imports = problem(MBPP_PLUS | {"test_imports": ["import math"], "test": "assert math.isclose(double(1.0), 2.0)"})
    assert imports.tests == CodeTests("import math\nassert math.isclose(double(1.0), 2.0)", "double")
    assert problem(MBPP_PLUS | {"test_list": []}).tests == found.tests
    for absent in ("", None):
        assert problem(MBPP_PLUS | {"test": absent}).tests == CodeTests("assert double(2) == 4", "double")


def run(tests: CodeTests, completion: str) -> bool:
    """Whether trusted code passes its program, in this process."""
    space: dict[str, Any] = {}
    exec(completion, space)
    try:
        exec(tests.program, space)
    except AssertionError:
        return False
    return True


def test_apps_gives_cases_or_calls() -> None:
    streams = {"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]}
    found = problem({"question": "Add.", "input_output": json.dumps(streams), "solutions": '["print(3)"]'})
    assert found.tests == CodeTests(cases=(Case("1 2\n", "3\n"), Case("3\n4\n", "7\n")))
    assert (found.question, found.solution) == ("Add.", "print(3)")
    calls = {"fn_name": "add", "inputs": [[1, 2], ["a", "b"]], "outputs": [[3], "ab"]}
    plain = problem({"question": "Add.", "input_output": calls})
    method = problem({"question": "Add.", "input_output": calls, "starter_code": "class Solution:\n    def add(self"})
    assert plain.tests is not None
    assert method.tests is not None
    assert (plain.tests.entry_point, method.tests.entry_point) == ("add", "")
    assert run(plain.tests, "def add(a, b): return a + b")
    assert not run(plain.tests, "def add(a, b): return a")
    assert run(method.tests, "class Solution:\n    def add(self, a, b): return a + b")
    assert not run(method.tests, "class Solution:\n    def add(self, a, b): return b")


@pytest.mark.parametrize("empty", ["", "[]", None, [], "  ", '[""]', "null"])
def test_apps_may_have_no_solution_and_no_starter(empty: Any) -> None:
    row = {"question": "Add.", "input_output": '{"inputs": ["1"], "outputs": ["2"]}', "solutions": empty}
    if empty != "null":
        assert (
            problem(row | {"starter_code": ""})
            == problem(row | {"starter_code": None})
            == Problem(0, "Add.", "", CodeTests(cases=(Case("1", "2"),)))
        )
    else:
        with pytest.raises(BadRow, match="'solutions' must hold a list"):
            problem(row)


@pytest.mark.parametrize("empty", ["", None, "{}", {}, "[]", " \n", "null", '{"inputs": [], "outputs": []}'])
def test_apps_without_tests_is_refused_in_a_sentence(empty: Any) -> None:
    with pytest.raises(BadRow, match=r"f\.jsonl:7: the field 'input_output' has no test, and a problem without tests"):
        problem({"question": "Add.", "input_output": empty, "solutions": "", "starter_code": ""})


def packed(value: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_livecodebench_reads_public_and_packed_private_tests() -> None:
    public = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
    private = [{"input": "2\n", "output": "3\n", "testtype": "stdin"}]
    row = {"question_content": "Next.", "starter_code": "", "public_test_cases": json.dumps(public), "metadata": "{}"}
    for form in (packed(json.dumps(private)), json.dumps(private), private):
        assert problem(row | {"private_test_cases": form}).tests == CodeTests(
            cases=(Case("1\n", "2\n"), Case("2\n", "3\n"))
        )
    calls = [{"input": "[1, 2]\n3", "output": "true", "testtype": "functional"}]
    starter = "class Solution:\n    def has(self, of: List[int], x: int) -> bool:\n        "
    method = {"public_test_cases": json.dumps(calls), "starter_code": starter, "metadata": '{"func_name": "has"}'}
    tests = problem(row | method).tests
    assert tests is not None
    assert not run(tests, "class Solution:\n    def has(self, of, x): return x in of")
    assert run(tests, "class Solution:\n    def has(self, of, x): return x not in of")


class Trap:
    """Would make a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_names_a_function_is_refused_and_not_run(tmp_path: Path) -> None:
    row = {"question_content": "q", "public_test_cases": "[]", "private_test_cases": packed(Trap(tmp_path / "trap"))}
    with pytest.raises(BadRow, match=r"f\.jsonl:7: the field 'private_test_cases' .*posix\.mkdir, and only text"):
        problem(row)
    assert not (tmp_path / "trap").exists()


@pytest.mark.skipif(
    not HUMANEVAL.is_file(), reason="HumanEval does not lie in ../shared/datasets beside the repository"
)
def test_humaneval_programs_pass_their_tests() -> None:
    found = list(read_problems(str(HUMANEVAL), {}))
    assert len(found) == 164
    for each in found[:20]:
        assert each.tests is not None
        assert each.tests.prefix == each.question
        assert run(each.tests, each.program + f"\n{each.tests.program}\ncheck({each.tests.entry_point})")


def test_fields_of_other_names_are_named() -> None:
    row = {"query": "q", "gold": 7, "answer": "not this"}
    assert problem(row, question="query", answer="gold") == Problem(0, "q", "7")
    with pytest.raises(BadRow, match=r"f\.jsonl:7: the field 'truth', which task.fields takes for answer, is missing"):
        problem(row, question="query", answer="truth")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q"}, "the field 'answer' is missing and no other shape fits; the row has the fields 'question'"),
        ({}, "the row has the fields none"),
        ({"question": "q", "answer": None}, "the field 'answer' is null"),
        ({"question": ["q"], "answer": "a"}, "the field 'question' must be text, and is a list"),
        ({"problem": "p"}, "the field 'answer' gives no answer"),
        ({"problem": "p", "solution": r"so \boxed{7"}, "the field 'solution' gives no answer"),
        ({"prompt": [{"role": "user"}], "reward_model": {}}, "the field 'content' is missing"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "reward_model": {}}, r"and has \['assistant'\]"),
        ({"prompt": "p", "reward_model": {}}, ", reward_model: the field 'ground_truth' is missing"),
        ({"question": "q", "input_output": "{"}, "the field 'input_output' must be JSON"),
        ({"question": "q", "input_output": '{"inputs": ["1"], "outputs": []}'}, "has 1 inputs and 0 outputs"),
        ({"question_content": "q", "public_test_cases": "[]"}, "'public_test_cases' has no case"),
        (
            {"question_content": "q", "public_test_cases": "", "private_test_cases": " "},
            "'public_test_cases' has no case",
        ),
        ({"text": "q", "code": "c", "test_list": []}, "'test_list' has no test"),
        ({"prompt": "p", "test": "", "entry_point": "f", "canonical_solution": "s"}, "'test' has no test"),
        ({"question": "q", "input_output": "[1]"}, "the field 'input_output' must hold an object"),
        ({"question_content": "q", "public_test_cases": "[]", "private_test_cases": "%"}, "neither JSON nor a packed"),
        ({"text": "q", "code": "c", "test_list": [1]}, "the field 'test_list' must be a list of texts"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_field(row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRow, match=rf"f\.jsonl:7.*{words}"):
        problem(row)


BALANCED = st.recursive(
    st.text("ab1+\\ ".replace("\\", ""), max_size=4),
    lambda t: st.lists(t).map(lambda p: "{" + "".join(p) + "}"),
    max_leaves=6,
)


@given(before=BALANCED, inside=BALANCED, after=st.text("ab {", max_size=5))
def test_a_box_holds_what_stands_between_its_braces(before: str, inside: str, after: str) -> None:
    assert last_boxed(rf"\boxed{{{before}}} then \boxed{{{inside}}} {after}") == (
        inside.strip() or before.strip() or None
    )
    assert last_boxed(before + after) is None
