"""Means over seeds with Student's t intervals, and exponents fitted on logarithms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval and the number of values that it is of."""

    mean: float
    low: float
    high: float
    count: int


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of values of different seeds with Student's interval, mean ± t · s / √n; NaN ends for a single value.

    Student's t and not a bootstrap: percentiles of three resampled values reach no further than the values themselves,
    and cover far less than 95%. Values that are no numbers, such as an accuracy of nothing graded, are left out.
    """
    kept = np.array([value for value in values if math.isfinite(value)])
    if not len(kept):
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(kept.mean())
    if len(kept) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = student_t(len(kept) - 1) * float(kept.std(ddof=1)) / math.sqrt(len(kept))
    return Interval(mean, mean - half, mean + half, len(kept))


@cache
def student_t(freedom: int) -> float:
    """The t within whose ± 95% of Student's distribution of so many degrees of freedom lie.

    The share outside is the regularised incomplete beta function I_x(ν/2, 1/2) at x = ν / (ν + t²) (Abramowitz and
    Stegun, 26.7.1), of which the root is sought.
    """
    import mpmath

    def outside(t: Any) -> Any:
        return mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)

    return float(mpmath.findroot(lambda t: outside(t) - 0.05, (1, 20), solver="ridder"))


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of log y over log x by least squares: b of y ∝ x^b; NaN with fewer than two places of positive y."""
    kept = [(x, y) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0]
    if len({x for x, _ in kept}) < 2:
        return math.nan
    logs = np.log(np.array(kept))
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
