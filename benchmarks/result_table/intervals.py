"""Means over seeds with 95% intervals: Student's t over seeds, or Wilson's over problems where there is one seed."""

import math
import statistics
from collections.abc import Sequence

from lockstep.cluster.evaluation.accuracy import wilson
from result_table.rows import Counts

CONFIDENCE = 0.95


def interval(counts: Sequence[Counts]) -> tuple[float, float, float]:
    """Mean accuracy of one count a seed, and the ends of its 95% interval, as shares.

    Of two seeds and more it is mean ± t · s / √n with Student's t of n − 1 degrees of freedom, and speaks of other
    seeds, which draw other problems, too. Of one it is Wilson's score interval, and speaks of other problems alone.
    """
    shares = [each.share for each in counts]
    mean = statistics.fmean(shares)
    if len(counts) == 1:
        return mean, *wilson(counts[0].correct, counts[0].graded)
    half = student_t(len(shares) - 1) * statistics.stdev(shares) / math.sqrt(len(shares))
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def student_t(freedom: int, inside: float = CONFIDENCE) -> float:
    """The t within which Student's distribution has a share on both sides of 0, to 12 digits, by halving."""
    low, high = 0.0, 1.0
    while student_share(high, freedom) < inside:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_share(middle, freedom) < inside else (low, middle)
    return high


def student_share(t: float, freedom: int) -> float:
    """The share of Student's distribution within ±t; Abramowitz and Stegun (1964), equations 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for number in range(freedom // 2):  # cos θ, 2/3 cos³θ, … or 1, 1/2 cos²θ, …
        total += term
        term *= square * (2 * number + 1 + odd) / (2 * number + 2 + odd)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
