"""Programs that solve their problem are judged correct, whatever honest Python they use."""

import gzip
import json
from collections.abc import Iterator
from decimal import Decimal, localcontext
from pathlib import Path

import pytest

from lockstep.data.tasks.code_tests import Case, CodeTests
from lockstep.rl.sandbox.guest import assembled
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
    "changes a queue": (
        "def f(q):\n    q.rotate(1)",
        "from collections import deque\nq = deque([1, 2, 3])\nf(q)\nassert list(q) == [3, 1, 2]",
    ),
    "sorts in place": ("def f(x): x.sort()", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
    "changes what lies inside": (
        "def f(grid):\n    for row in grid: row.append(0)",
        "g = [[1], [2]]\ninner = g[0]\nf(g)\nassert g == [[1, 0], [2, 0]] and inner == [1, 0]",
    ),
    "raises what ends a recursion": (
        "def f(x): return f(x)",
        "try:\n    f(1)\nexcept RecursionError:\n    pass\nelse:\n    assert False",
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


CALLED = CodeTests("candidate = Solution().f\nassert candidate(*[[3, 1, 2]]) == [1, 2, 3]")
SITES = {
    "typing": "    def f(self, x: List[int]) -> Optional[List[int]]:\n        return sorted(x)",
    "a heap": "    def f(self, x):\n        heapq.heapify(x)\n        return [heappop(x) for _ in range(len(x))]",
    "counters and queues": "    def f(self, x):\n        return list(deque(sorted(Counter(x).elements())))",
    "caches and constants": "    order: Dict[str, Tuple[int, ...]] = defaultdict(tuple)\n    INF = inf\n"
    "    @lru_cache(None)\n    def low(self, n): return floor(sqrt(n * n))\n"
    "    def f(self, x): return list(accumulate(sorted(map(self.low, x)), max))",
    "names of its own": "    def f(self, x): return gcd(x)\ndef gcd(x): return sorted(x)",
    "deep recursion": "    def g(self, n): return n and self.g(n - 1)\n"
    "    def f(self, x): return sorted(x)[self.g(20000) :]",
}


@pytest.mark.parametrize("name", SITES)
def test_names_that_sites_import_before_a_program_are_there(pool: CodePool, name: str) -> None:
    assert outcome(pool, f"class Solution:\n{SITES[name]}", CALLED) == (Outcome.correct, "")


@pytest.mark.parametrize(
    "end", ["exit()", "quit()", "exit(0)", "sys.exit()", "raise SystemExit", "import builtins; builtins.exit()"]
)
def test_a_program_may_end_itself(pool: CodePool, end: str) -> None:
    program = f"n = int(input())\nif n > 1:\n    print('large')\n    {end}\nprint('small')"
    tests = CodeTests(cases=(Case("5\n", "large\n"), Case("1\n", "small\n")))
    assert outcome(pool, program, tests) == (Outcome.correct, "")


def test_a_program_that_ends_itself_as_failed_has_failed(pool: CodePool) -> None:
    tests = CodeTests(cases=(Case("5\n", "5\n"),))
    for end in ("exit(1)", "quit('no')", "sys.exit(3)"):
        assert outcome(pool, f"print(input())\n{end}", tests)[0] is Outcome.incorrect


with localcontext(prec=6000):
    LONG = f"{Decimal(3) ** 12000:f}"


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("print(3 ** int(input()))", CodeTests(cases=(Case("12000", LONG),))),
        ("print(int(input()) % 97)", CodeTests(cases=(Case(LONG, str(3**12000 % 97)),))),
        ("def f(n): return 3 ** n", CodeTests(f"assert f(12000) == {LONG}", "f")),
        ("def f(n): return str(3 ** n)", CodeTests("assert f(12000) == str(3 ** 12000)", "f")),
        (
            "def f(s): return sum(map(int, str(int(s) * 10)))",
            CodeTests(f"assert f('{LONG}') == {sum(map(int, LONG))}", "f"),
        ),
    ],
    ids=["printed", "read", "returned", "as text", "digits"],
)
def test_integers_of_thousands_of_digits_are_read_and_printed(pool: CodePool, program: str, tests: CodeTests) -> None:
    assert outcome(pool, program, tests) == (Outcome.correct, "")


@pytest.mark.parametrize(
    ("returned", "wanted", "right"),
    [
        ("[x / 3, 1]", "[0.333333333, 1]", True),
        ("{'a': [x / 3]}", "{'a': [0.333333333]}", True),
        ("(x * 0.1 * 3, 'b')", "(0.3, 'b')", True),
        ("[x / 3 + 0.00001]", "[0.333333333]", False),
        ("[x * 1000000000000000]", "[1000000000000000.5]", False),
        ("[1000000000000001]", "[1000000000000002]", False),
        ("['0.3333333333']", "['0.333333333']", False),
    ],
)
def test_floats_in_what_is_returned_are_right_within_1e_6(
    pool: CodePool, returned: str, wanted: str, right: bool
) -> None:
    tests = CodeTests(f"candidate = Solution().f\nassert candidate(*[1]) == {wanted}")
    program = f"class Solution:\n    def f(self, x):\n        return {returned}"
    assert outcome(pool, program, tests)[0] is (Outcome.correct if right else Outcome.incorrect)


HUMANEVAL_PLUS = """
import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    return False

def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        np.testing.assert_allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"

def check(candidate):
    inputs, results = [[1.0, 4.0], [9.0, 3.0]], [[0.25, 4.0], [3.0, 1 / 3]]
    for inp, exp in zip(inputs, results):
        assertion(candidate(*inp), exp, 0)
"""


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("    return [a / b, b / a]", True),
        ("    return [round(a / b, 8), round(b / a, 8)]", True),
        ("    import numpy as np\n    return list(np.array([a, b]) / np.array([b, a]))", True),
        ("    return [round(a / b, 3), round(b / a, 3)]", False),
        ("    return [a / b]", False),
        ("    return 'no'", False),
        ("    return None", False),
        ("    return (x for x in [a / b, b / a])", False),
    ],
)
def test_tests_with_numpy_judge_programs_with_and_without_it(pool: CodePool, body: str, right: bool) -> None:
    tests = CodeTests(HUMANEVAL_PLUS, "ratios", "def ratios(a: float, b: float):\n    ''' Quotients. '''\n")
    assert outcome(pool, body, tests)[0] is (Outcome.correct if right else Outcome.incorrect)


PYTEST = """
import pytest
from solution import double, Half

@pytest.fixture
def half():
    return Half(4)

def test_double():
    assert double(0.1) == pytest.approx(0.2)

class TestHalf:
    @pytest.mark.parametrize("divisor,wanted", [(1, 2), (2, 1)])
    def test_value(self, half, divisor, wanted):
        assert half.value / divisor == wanted

def test_error():
    with pytest.raises(ValueError, match="negative"):
        Half(-1)

if __name__ == "__main__":
    pytest.main([__file__])
"""
HALVES = """
def double(x): return x * 2
class Half:
    def __init__(self, x):
        if x < 0: raise ValueError("negative")
        self.value = x / 2
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (HALVES, ""),
        (HALVES.replace("x * 2", "x"), "an assertion failed"),
        (HALVES.replace("x / 2", "x"), "an assertion failed"),
        (HALVES.replace("negative", "odd"), "an assertion failed"),
        (HALVES.replace("if x < 0", "if False"), "an assertion failed: did not raise"),
        (HALVES.replace("Half", "Halves"), "the program does not define Half"),
    ],
)
def test_tests_for_pytest_import_what_they_test_and_are_called(pool: CodePool, program: str, reason: str) -> None:
    for entry_point in ("", "double"):
        result, said = outcome(pool, program, CodeTests(PYTEST, entry_point))
        assert said.startswith(reason)
        assert result is (Outcome.incorrect if reason else Outcome.correct)


def test_a_completion_may_bring_tests_of_its_own(pool: CodePool) -> None:
    program = "import pytest\ndef f(x): return x\ndef test_f():\n    assert f(1) == pytest.approx(1)\n"
    assert outcome(pool, program, CodeTests("assert f(1) == 1", "f")) == (Outcome.correct, "")


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
        (CodeTests("import no_such_library\nassert f(1) == 1"), "ModuleNotFoundError"),
        (CodeTests("def test_f(tmp_path): assert f(1) == 1", "f"), "fixture 'tmp_path', which is not offered"),
        (CodeTests("x = " + "(" * 1000 + ")" * 1000, "f"), "do not compile"),
    ],
)
def test_tests_that_cannot_judge_make_a_completion_ungradable(pool: CodePool, tests: CodeTests, reason: str) -> None:
    result, said = outcome(pool, "def f(x): return 1", tests)
    assert result is Outcome.ungradable
    assert reason in said


NESTED = CodeTests("x = 0\nfor _ in range(200):\n    x = f(x)\nassert x == 1", "f")
NAMELESS = CodeTests("assert f(1) == 1")
DEEPER = """
import json, os, struct
def f(x):
    value = 0
    for _ in range(151):
        value = ["list", value]
    message = json.dumps(["value", value, None]).encode()
    os.write(4, struct.pack(">I", len(message)) + message)
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("", NAMELESS, "does not define f"),
        ("f = 1", NAMELESS, "does not define f"),
        ("def g(x): return x", NAMELESS, "does not define f"),
        ("def f(x: return x", NAMELESS, "SyntaxError"),
        ("def f(x): return [x]", NESTED, "RecursionError"),
        (DEEPER, NESTED, ""),
        ("def f(x): raise KeyError(1 << 10_000_000)", NAMELESS, ""),
        ("def f(x): return f(x)", NAMELESS, "RecursionError"),
        ("def f(x): raise MemoryError", NAMELESS, "MemoryError"),
        ("def f(x): return 1 << 10_000_000", CodeTests("out = f(1)\nassert out == 1, f'{out}'", "f"), "ValueError"),
        ("class X(Exception): pass\ndef f(x): raise X", NAMELESS, "Exception"),
        ("import threading, os\nthreading.Timer(0.0, os._exit, [0]).start()\ndef f(x): return 1\n"
         "while True: pass", NAMELESS, "the program ended"),
        ("f = '\ud800'\ndef f(x): return '\ud800'", NAMELESS, ""),
        ("def f(x): return 'x' * 5_000_000", NAMELESS, "no value"),
    ],
)  # fmt: skip
def test_what_a_completion_causes_is_incorrect(pool: CodePool, program: str, tests: CodeTests, reason: str) -> None:
    result, said = outcome(pool, program, tests)
    assert result is Outcome.incorrect, said
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
