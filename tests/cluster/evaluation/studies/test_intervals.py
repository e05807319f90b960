"""Student's t, intervals over seeds and exponents, against tables and closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.cluster.evaluation.studies.intervals import exponent, mean_interval, student_t


@pytest.mark.parametrize(("freedom", "wanted"), [(1, 12.706), (2, 4.3027), (4, 2.7764), (9, 2.2622), (100, 1.9840)])
def test_quantiles_are_those_of_the_tables(freedom: int, wanted: float) -> None:
    assert student_t(freedom) == pytest.approx(wanted, rel=1e-4)


def test_an_interval_is_the_textbooks() -> None:
    found = mean_interval([1.0, 2.0, 3.0, math.nan])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert found.low == pytest.approx(4 - found.high)
    assert math.isnan(mean_interval([1.0]).low)
    assert mean_interval([]).count == 0


@given(st.floats(-3, 3), st.floats(0.01, 100))
def test_an_exponent_is_that_of_a_power_law(power: float, scale: float) -> None:
    xs = [2.0, 8.0, 64.0]
    assert exponent(xs, [scale * x**power for x in xs]) == pytest.approx(power, abs=1e-9)
    assert math.isnan(exponent([4.0, 4.0], [1.0, 2.0]))
