"""Decimals are equal within 1e-6; integers, texts and everything else exactly."""

from decimal import Decimal
from typing import Any

import pytest

from lockstep.rl.sandbox.harness.comparison import CLOSE, close, same_output, with_tolerance


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n", "1  2", True),
        ("1\n2", "1 2", False),
        ("1.50", "1.5", True),
        ("01", "1", False),
        ("", "\n", True),
        ("1\n\n2", "1\n2", False),
        ("0.333333", "0.333333333333", True),
        ("0.33333", "0.333333333333", False),
        ("1.0000001", "1.0", True),
        ("1.00001", "1.0", False),
        ("2", "2.0", True),
        ("2", "1.9999999999", True),
        ("-0.0", "0.0", True),
        ("1e-7", "0.0", True),
        ("3.0", "3", False),
        ("3.0000001", "3", False),
        ("1000000000000001", "1000000000000002", False),
        ("1234567.89", "1234568.89", False),
        ("123456789012.33333", "123456789012.333328", True),
        ("x=0.333333", "x=0.333333333", False),
        ("[0.3333333333, 2.0]", "[0.333333, 2.0]", True),
        ("(0.33, 2)", "(0.333333, 2)", False),
        ("['0.3333333333']", "['0.333333']", False),
        ("1.10.3", "1.1.3", False),
        ("1_0.0", "10.0", False),
        ("nan", "0.5", False),
        ("inf", "1e999", False),
        ("1e999999999", "2e-999999999", False),
        ("0x1.8", "1.5", False),
    ],
)
def test_outputs_are_compared_line_by_line(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ([1 / 3, 2], [0.333333, 2], True),
        ((0.1 + 0.2, [1.0]), (0.3, [1.0000005]), True),
        ({"a": 0.3333333}, {"a": 1 / 3}, True),
        ([0.333], [1 / 3], False),
        ([1.0000001], [1], False),
        ([3], [3.0], True),
        (["0.3333333"], ["0.3333334"], False),
        ([0.5], (0.5,), False),
        ([0.5, 0.5], [0.5], False),
        ({"a": 0.5}, {"b": 0.5}, False),
        (1 << 60, (1 << 60) + 1, False),
        (Decimal("0.3333333"), Decimal("0.3333334"), False),
        (float("nan"), float("nan"), False),
        (float("inf"), 1e308, False),
        (True, 0.9999999999, False),
    ],
)
def test_floats_are_close_wherever_they_lie(ours: Any, theirs: Any, same: bool) -> None:
    assert close(ours, theirs) is same
    assert close(theirs, ours) is same


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        ("assert [1 / 3] == [0.333333333]", True),
        ("assert (r := [1 / 3]) == [0.5] or r == [0.333333333]", True),
        ("assert all(a == b for a, b in [(1 / 3, 0.333333333)]) and 1 / 3 == 0.333333333", True),
        ("def check(f):\n    assert f() == 0.333333333\ncheck(lambda: 1 / 3)", True),
        ("same = 1 / 3 == 0.333333333\nassert same", False),
        ("assert 1 / 3 == 0.333", False),
        ("assert not 1 / 3 == 0.333333333", False),
        ("assert 1 / 3 != 0.333333333", True),
        ("assert 1 < 2 == 2.0", True),
        ("assert '0.3' == '0.30'", False),
    ],
)
def test_assertions_alone_are_tolerant(source: str, passes: bool) -> None:
    def run() -> None:
        exec(compile(with_tolerance(source), "tests.py", "exec"), {CLOSE: close})

    if passes:
        run()
    else:
        with pytest.raises(AssertionError):
            run()


def test_tests_without_decimals_are_compiled_as_they_are() -> None:
    assert with_tolerance("candidate = Solution().f\nassert candidate(1) == 2") == (
        "candidate = Solution().f\nassert candidate(1) == 2"
    )
