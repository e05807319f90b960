"""Estimates: pass@k against counting every choice, intervals against published values and simulated draws."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lockstep.cluster.evaluation.accuracy import (
    Tally,
    accuracy_row,
    estimate_accuracy,
    mean_pass_at_k,
    pass_at_k,
    tally,
    wilson,
)


@given(st.data(), st.integers(1, 9))
def test_pass_at_k_is_the_share_of_choices_with_a_correct_one(data: st.DataObject, graded: int) -> None:
    correct, k = data.draw(st.integers(0, graded)), data.draw(st.integers(1, graded))
    choices = list(combinations([True] * correct + [False] * (graded - correct), k))
    assert pass_at_k(graded, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_pass_at_k_stays_exact_where_binomials_overflow() -> None:
    graded, correct, k = 20000, 3, 1000
    wrong = math.comb(graded - correct, k) / math.comb(graded, k)  # exact integers, rounded once
    assert pass_at_k(graded, correct, k) == pytest.approx(1 - wrong, rel=1e-11)


def test_pass_at_k_is_unbiased_where_the_naive_estimate_is_not() -> None:
    share, graded, k = 0.3, 6, 4
    true, random = 1 - (1 - share) ** k, np.random.default_rng(0)
    drawn = random.binomial(graded, share, size=20000)
    assert np.mean([pass_at_k(graded, int(c), k) for c in drawn]) == pytest.approx(true, abs=0.01)
    assert abs(np.mean(1 - (1 - drawn / graded) ** k) - true) > 0.03


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)],
)
def test_wilson_against_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_pass_at_k_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    shares = random.beta(0.5, 1.0, size=(150, 60))  # problems differ; their completions are alike
    truth, held = 1 / 3, 0
    for row in shares:
        found = mean_pass_at_k([Tally(int(c), 8 - int(c)) for c in random.binomial(8, row)], 1)
        held += found.low <= truth <= found.high
    assert 0.88 < held / len(shares) <= 0.99


def test_the_ungradable_are_left_out_and_never_wrong() -> None:
    tallies = [tally(["correct"]), tally(["incorrect"]), tally(["ungradable"]), tally(["correct"])]
    assert tallies[2] == Tally(ungradable=1)
    assert (estimate_accuracy(tallies).value, estimate_accuracy(tallies).problems) == (2 / 3, 3)
    sampled = [Tally(2, 0, 2), Tally(1, 0, 3), Tally(1, 3)]
    assert mean_pass_at_k(sampled, 2).problems == 2
    assert mean_pass_at_k(sampled, 2).value == pytest.approx((1 + 0.5) / 2)
    assert accuracy_row(["correct", "incorrect", "ungradable", "correct"]) == {
        "accuracy": estimate_accuracy(tallies).value,
        "correct": 2,
        "total": 4,
        "ungradable": 1,
    }
    assert math.isnan(accuracy_row(["ungradable"])["accuracy"])
    nothing = mean_pass_at_k(sampled, 5)
    assert (nothing.problems, nothing.low, nothing.high) == (0, 0.0, 1.0)
    assert math.isnan(nothing.value)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
@example([(1, 1), (3, 3), (1, 1)])
def test_an_interval_holds_its_estimate_and_has_a_width(counts: list[tuple[int, int]]) -> None:
    tallies = [Tally(c, i) for c, i in counts]
    found = mean_pass_at_k(tallies, 1)
    if found.problems:
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.high > found.low
    assert mean_pass_at_k(tallies, 1) == found or math.isnan(found.value)
