"""What the temperature sweep measures of completions, against numbers by hand."""

import math

import pytest

from lockstep.cluster.evaluation.studies.catalog.generation import measures
from lockstep.rl.types import Prompt, Rollout

PROMPTS = [Prompt(0, "", (3,), ""), Prompt(1, "", (4,), "")]


def rollout(prompt: int, sample: int, tokens: tuple[int, ...], logp: float) -> Rollout:
    count = len(tokens)
    return Rollout(sample, tokens, (logp,) * count, "", "stop", (0,) * count, prompt=PROMPTS[prompt])


def test_measures_by_hand() -> None:
    alike = [rollout(0, 0, (1, 2, 3, 4), -1.0), rollout(0, 1, (1, 2, 3, 4), -1.0)]
    apart = [rollout(1, 2, (5, 6), -2.5), rollout(1, 3, (7, 8), -2.5)]
    found = measures([*apart, *alike])
    assert found["distinct-1"] == 8 / 12
    assert found["self-BLEU"] == pytest.approx((1 + 0) / 2)
    assert found["entropy"] == pytest.approx((8 * 1.0 + 4 * 2.5) / 12)
    assert found["length"] == 3
    assert math.isnan(measures([rollout(0, 0, (1,), -1.0)])["self-BLEU"])
