"""Accuracy and pass@k over problems, with 95% confidence intervals.

Held-out accuracy of a run and that of `lockstep eval` are one function, `estimate_accuracy`. Ungradable completions
count as neither right nor wrong: they are left out, and their number stands beside the shares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.rl.verdict import Outcome

Z = 1.959964
"""Standard deviations of a normal distribution within which 95% of it lie."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Tally:
    """Counts of the verdicts on the completions of one problem."""

    correct: int = 0
    incorrect: int = 0
    ungradable: int = 0

    @property
    def graded(self) -> int:
        """Completions that were graded correct or incorrect."""
        return self.correct + self.incorrect


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95% interval, and how many problems it is of."""

    value: float
    low: float
    high: float
    problems: int


def tally(outcomes: Sequence[str]) -> Tally:
    """Count the verdicts on one problem's completions, given as names of `Outcome`."""
    return Tally(*(sum(outcome == kind for outcome in outcomes) for kind in Outcome))


def wilson(correct: float, total: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of correct out of total, as fractions; 0 to 1 where total is 0 (Wilson, 1927)."""
    if total <= 0:
        return 0.0, 1.0
    share, square = correct / total, z * z / total
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(max(0.0, share * (1 - share)) / total + square / (4 * total))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def estimate_accuracy(tallies: Sequence[Tally]) -> Estimate:
    """Accuracy: the share of graded completions that are correct, one a problem, with Wilson's interval.

    What is ungradable is left out, because nothing that a completion does makes it so.
    """
    correct, graded = sum(t.correct for t in tallies), sum(t.graded for t in tallies)
    low, high = wilson(correct, graded)
    return Estimate(correct / graded if graded else math.nan, low, high, graded)


def accuracy_row(outcomes: Sequence[str]) -> dict[str, float]:
    """A run's record of greedy completions, one a problem: their accuracy, and how many of what outcome there are."""
    counts = tally(outcomes)
    return {
        "accuracy": estimate_accuracy([counts]).value,
        "correct": counts.correct,
        "total": len(outcomes),
        "ungradable": counts.ungradable,
    }


def pass_at_k(graded: int, correct: int, k: int) -> float:
    """pass@k: the probability that one of k completions is correct, 1 − C(n−c, k)/C(n, k), without bias.

    Chen et al. 2021 (arXiv:2107.03374), equation 1, in whole numbers until the last division, so that problems of the
    same chance have the same value.

    Args:
        graded: n, completions of the problem, at least k.
        correct: c, those of them that are correct.
    """
    assert 0 <= correct <= graded >= k > 0
    draws = math.comb(graded, k)
    return (draws - math.comb(graded - correct, k)) / draws


def mean_pass_at_k(tallies: Sequence[Tally], k: int, seed: int = 0) -> Estimate:
    """Mean pass@k over problems, with a bootstrap interval; problems with fewer than k graded completions are left out.

    The interval is that of resampled problems (percentiles of the bootstrap, Efron 1979): completions of one problem
    are alike, and what another draw of problems would have brought is what matters. Where all problems have the same
    value, resampling shows no spread, and Wilson's interval of as many single outcomes stands in.
    """
    values = np.array([pass_at_k(t.graded, t.correct, k) for t in tallies if t.graded >= k])
    if not len(values):
        return Estimate(math.nan, 0.0, 1.0, 0)
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Estimate(mean, *wilson(mean * len(values), len(values)), len(values))
    random = np.random.default_rng(seed)
    shape = (RESAMPLES // 20, len(values))
    means = [values[random.integers(len(values), size=shape)].mean(axis=1) for _ in range(20)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(mean, float(low), float(high), len(values))
