"""Programs that solve their problem are judged correct, whatever honest Python they use."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.data.tasks.code_tests import Case, CodeTests
from lockstep.rl.sandbox.guest import assembled
from lockstep.rl.sandbox.harness import same_output
from lockstep.rl.sandbox.isolation import NOTHING
from lockstep.rl.verdict import Outcome
from lockstep.rl.verifiers.code_pool import CodePool

HUMANEVAL = Path(__file__).parents[4] / "shared" / "datasets" / "humaneval" / "HumanEval.jsonl.gz"


@pytest.fixture(scope="module")
def pool() -> Iterator[CodePool]:
    with CodePool(2, requires=NOTHING) as pool:
        yield pool


def outcome(pool: CodePool, completion: str, tests: CodeTests) -> tuple[Outcome, str]:
    (verdict,) = pool.grade([(completion, tests)])
    return verdict.outcome, verdict.reason


@pytest.mark.skipif(
    not HUMANEVAL.is_file(), reason="HumanEval does not lie in ../shared/datasets beside the repository"
)
def test_humaneval_solutions_are_correct_and_empty_ones_are_not(pool: CodePool) -> None:
    rows = [json.loads(line) for line in gzip.decompress(HUMANEVAL.read_bytes()).splitlines()]
    tests = [CodeTests(row["test"], row["entry_point"], row["prompt"]) for row in rows]
    whole = [f"Here it is:\n```python\n{row['prompt']}{row['canonical_solution']}```\nDone." for row in rows]
    solutions = [row["canonical_solution"] for row in rows]
    for completions in (solutions, whole):
        verdicts = pool.grade(list(zip(completions, tests, strict=True)))
        assert [row["task_id"] for row, v in zip(rows, verdicts, strict=True) if v.outcome is not Outcome.correct] == []
    assert {v.outcome for v in pool.grade([("    return None\n", one) for one in tests])} == {Outcome.incorrect}


HONEST = {
    "sorts in place": ("def f(x): x.sort()", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
    "changes what lies inside": (
        "def f(grid):\n    for row in grid: row.append(0)",
        "g = [[1], [2]]\ninner = g[0]\nf(g)\nassert g == [[1, 0], [2, 0]] and inner == [1, 0]",
    ),
    "raises": (
        "class Odd(ValueError): pass\ndef f(x): raise Odd('no')",
        "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False",
    ),
    "yields": ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2] and sum(f(4)) == 6"),
    "a class": (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def __len__(self): return len(self.items)",
        "s = Stack()\ns.push(1)\ns.push('b')\nassert len(s) == 2 and s.items == [1, 'b']",
    ),
    "linked nodes": (
        "class Node:\n    def __init__(self, v): self.v, self.next = v, None\ndef last(n):\n"
        "    while n.next: n = n.next\n    return n.v",
        "a, b = Node(1), Node(2)\na.next = b\nassert last(a) == 2 and a.next is b",
    ),
    "values of all kinds": (
        "def f(*values, **named): return values[0] if values else named",
        "from fractions import Fraction\nfrom decimal import Decimal\nfrom collections import deque\n"
        "for v in [None, True, 2 ** 200, -0.5, 1j, 'é\\ud800', b'x', (1, [2]), {1: (2,)}, {3}, frozenset([4]),\n"
        "          range(5), Fraction(1, 3), Decimal('0.10'), deque([1]), bytearray(b'y'), float('inf')]:\n"
        "    r = f(v)\n    assert r == v and type(r) is type(v)\nassert f(a=1) == {'a': 1}",
    ),
    "subclasses": (
        "import collections, enum\nclass C(enum.IntEnum):\n    A = 1\nP = collections.namedtuple('P', 'x y')\n"
        "def f(): return [C.A, P(1, 2), collections.Counter('aab'), collections.defaultdict(int, {1: 2})]",
        "assert f() == [1, (1, 2), {'a': 2, 'b': 1}, {1: 2}]",
    ),
    "recursion, threads, files, prints": (
        "import sys, threading\nsys.setrecursionlimit(10 ** 5)\ndef depth(n): return n and 1 + depth(n - 1)\n"
        "def f():\n    print('noise')\n    out = []\n    t = threading.Thread(target=lambda: out.append(depth(5000)))\n"
        "    t.start(); t.join()\n    with open('mine', 'w') as file: file.write(str(out[0]))\n"
        "    return open('mine').read()",
        "assert f() == '5000'",
    ),
    "a demonstration": (
        "def f(): return 1\nif __name__ == '__main__':\n    print(f()); input(); exit(1)",
        "assert f() == 1",
    ),
    "unittest": (
        "def f(x): return x + 1",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_are_correct(pool: CodePool, name: str) -> None:
    program, tests = HONEST[name]
    if name.endswith("prints") and not pool.isolation.namespaces:
        pytest.skip("without namespaces programs have no folder to write in")
    assert outcome(pool, program, CodeTests(tests)) == (Outcome.correct, "")


@pytest.mark.parametrize(
    ("program", "stdin", "stdout"),
    [
        ("print(int(input()) + 1)", "1", "2\n"),
        ("import sys\nprint(len(sys.stdin.buffer.read()))\nsys.exit()", "x" * 300_000, "300000"),
        ("def main():\n    print('é', 1.50)\nif __name__ == '__main__':\n    main()", "", "é 1.5"),
        ("import threading\nthreading.Thread(target=lambda: print(open(0).read())).start()", "a  b \n\n", "a b"),
        ("import atexit, io, sys\nsys.stdout = io.StringIO()\nprint('late')\n"
         "atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))", "", "late"),
        ("try:\n    while True: print(input()[::-1])\nexcept EOFError: pass", "ab\ncd\n", "ba\ndc\n"),
    ],
)  # fmt: skip
def test_whole_programs_that_print_what_is_expected_are_correct(
    pool: CodePool, program: str, stdin: str, stdout: str
) -> None:
    assert outcome(pool, program, CodeTests(cases=(Case(stdin, stdout),) * 2)) == (Outcome.correct, "")


def test_a_method_is_reached_through_its_class(pool: CodePool) -> None:
    program = "class Solution:\n    def twice(self, n): return 2 * n"
    tests = CodeTests("def check(candidate):\n    assert candidate(4) == 8", "Solution().twice")
    assert outcome(pool, program, tests) == (Outcome.correct, "")


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (CodeTests(), "there are no tests"),
        (CodeTests("assert (", "f"), "do not compile"),
        (CodeTests("x = 1", "f"), "never called the program"),
        (CodeTests("missing.name", "f"), "NameError"),
        (CodeTests("assert f(object()) == 1", "f"), "cannot cross"),
    ],
)
def test_tests_that_cannot_judge_make_a_completion_ungradable(pool: CodePool, tests: CodeTests, reason: str) -> None:
    result, said = outcome(pool, "def f(x): return 1", tests)
    assert result is Outcome.ungradable
    assert reason in said


def test_tests_see_changed_arguments_only_where_nothing_is_returned(pool: CodePool) -> None:
    tests = CodeTests("x = [1]\nf(x)\nassert x == []", "f")
    assert outcome(pool, "def f(x): x.clear()", tests)[0] is Outcome.correct
    assert outcome(pool, "def f(x):\n    x.clear()\n    return x", tests)[0] is Outcome.incorrect


def test_a_completion_continues_its_prefix_or_replaces_it() -> None:
    prefix = "import math\ndef f(x):\n    '''Doc.'''\n"
    assert assembled(prefix, "    return x\n", "f") == prefix + "    return x\n"
    assert assembled(prefix, "def f(x): return x", "f") == prefix + "\ndef f(x): return x"
    assert assembled("def f(x):\n", "def f(x): return x", "f") == "def f(x): return x"


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n", "1  2", True),
        ("1\n2", "1 2", False),
        ("1.50", "1.5", True),
        ("1.0000001", "1.0", False),
        ("01", "1", False),
        ("", "\n", True),
        ("1\n\n2", "1\n2", False),
    ],
)
def test_outputs_are_compared_line_by_line(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same
