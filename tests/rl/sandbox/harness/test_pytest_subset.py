"""Tests written for pytest run as pytest runs them, and what is not offered is said."""

import textwrap
from typing import Any

import numpy as np
import pytest

from lockstep.rl.sandbox.harness import pytest_subset

FILE = "tests.py"


def collected(source: str, spared: frozenset[str] = frozenset(), candidate: Any = None) -> list[Any]:
    """What the tests of a source append to `seen`."""
    names: dict[str, Any] = {"__name__": "__main__", "__file__": FILE, "seen": []}
    names["pytest"] = pytest_subset.module(names)
    exec(compile(textwrap.dedent(source), FILE, "exec"), names)
    pytest_subset.run(names, FILE, set(spared), candidate)
    found: list[Any] = names["seen"]
    return found


def test_functions_and_methods_are_called_once_for_each_set_of_arguments() -> None:
    assert collected(
        """
        def test_one(): seen.append(1)
        def helper_test(): seen.append('never')
        class TestSome:
            def setup_method(self): self.x = 5
            def test_two(self): seen.append(self.x)
            @pytest.mark.parametrize('v', [7, 8])
            def test_three(self, v): seen.append(v + self.x)
        @pytest.mark.slow
        @pytest.mark.parametrize("a", [1, pytest.param(2, id="two")])
        @pytest.mark.parametrize(("b", "c"), [(3, 4)])
        def test_product(a, b, c): seen.append((a, b, c))
        """
    ) == [1, 12, 13, 5, (1, 3, 4), (2, 3, 4)]


def test_fixtures_are_made_for_each_test_and_ended_behind_it() -> None:
    assert collected(
        """
        @pytest.fixture
        def base(): return 2
        @pytest.fixture()
        def stack(base):
            seen.append('begin')
            yield [base]
            seen.append('end')
        @pytest.fixture(autouse=True)
        def always(): seen.append('always')
        def test_a(stack, base): seen.append(stack * base)
        def test_b(candidate): seen.append(candidate)
        """,
        candidate=9,
    ) == ["always", "begin", [2, 2], "end", "always", 9]


def test_what_tests_call_themselves_or_skip_is_not_called_again() -> None:
    source = """
    def test_a(x=1): seen.append(x)
    test_a()
    @pytest.mark.skip(reason='later')
    def test_b(): seen.append('b')
    @pytest.mark.skipif(True, reason='never')
    def test_c(): seen.append('c')
    @pytest.mark.skip
    def test_d(): seen.append('d')
    def test_e():
        pytest.skip('now')
        seen.append('e')
    """
    assert collected(source, spared=frozenset({"test_a"})) == [1]


def test_the_main_function_runs_what_stands_before_it() -> None:
    assert collected(
        "def test_a(): seen.append(1)\nassert pytest.main([__file__, '-q']) == 0", frozenset({"test_a"})
    ) == [1]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("def test_a(): assert False", AssertionError),
        ("def test_a(): pytest.fail('no')", AssertionError),
        ("def test_a():\n    with pytest.raises(ValueError): pass", AssertionError),
        ("def test_a():\n    with pytest.raises(ValueError, match='no'): raise ValueError('yes')", AssertionError),
        ("def test_a():\n    with pytest.raises(ValueError): raise KeyError(1)", KeyError),
        ("@pytest.mark.parametrize('x', [1, 2])\ndef test_a(x): assert x == 1", AssertionError),
        ("class TestA:\n    def test_a(self): assert 1 == 2", AssertionError),
        ("def test_a(tmp_path): pass", pytest_subset.Unsupported),
        ("@pytest.fixture(params=[1])\ndef x(): pass", pytest_subset.Unsupported),
    ],
)
def test_the_first_failure_is_raised(source: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        collected(source)


def test_raises_passes_where_the_exception_is_raised() -> None:
    with pytest_subset.raises((KeyError, ValueError), match=r"^n.$") as raised:
        raise ValueError("no")
    assert raised.match("o")
    assert (raised.type, raised.value.args) == (ValueError, ("no",))
    assert pytest_subset.raises(ValueError, int, "x").type is ValueError


VALUES = [
    (0.1 + 0.2, 0.3),
    (1.001, 1.0),
    ([0.1 + 0.2, 1], [0.3, 1.0]),
    ([0.3], [0.3, 0.3]),
    ((0.3,), (0.3000000001,)),
    ({"a": 0.30000000001}, {"a": 0.3}),
    ({"a": 0.3}, {"b": 0.3}),
    (1, 1.0000001),
    ("a", "a"),
    (None, None),
    (None, 1.0),
    ("x", 1.0),
    (float("inf"), float("inf")),
    (1.0, float("inf")),
    (float("nan"), float("nan")),
    (1 + 1j, 1 + 1.0000001j),
    (True, 1.0),
    (np.array([0.1 + 0.2]), np.array([0.3])),
    (np.float64(0.1 + 0.2), 0.3),
]


@pytest.mark.parametrize("settings", [{}, {"abs": 0.01}, {"rel": 1e-2}, {"rel": 0, "abs": 0}], ids=str)
def test_approximations_are_those_of_pytest(settings: dict[str, float]) -> None:
    for actual, expected in VALUES:
        if isinstance(expected, str | None) and "rel" in settings:
            continue  # pytest wants numbers there
        ours = actual == pytest_subset.Approx(expected, **settings)
        assert ours is bool(actual == pytest.approx(expected, **settings)), (actual, expected)
        assert (pytest_subset.Approx(expected, **settings) != actual) is not ours
