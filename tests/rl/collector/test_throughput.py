"""Tokens per second and the busy share of engines, by a clock that the test moves."""

import pytest

from lockstep.rl.collector.rollout_service import Throughput
from lockstep.rl.rollout.output_processor import Written


def test_rates_are_over_the_seconds_of_engines_and_shares_over_all_time() -> None:
    now = [100.0]
    throughput = Throughput(lambda: now[0])
    throughput.note(0, Written(tokens=300, seconds=2.0))
    throughput.note(0, Written(tokens=100, seconds=2.0))
    throughput.note(1, Written(tokens=90, seconds=3.0))
    now[0] = 110.0
    assert throughput.take(2) == pytest.approx(said(400 / 4 + 90 / 3, 7 / 20))
    now[0] = 110.5  # a step that waits for nothing, since others wrote ahead, has no endless rate
    throughput.note(1, Written(tokens=60, seconds=0.5))
    assert throughput.take(2) == pytest.approx(said(120.0, 0.5))
    now[0] = 120.0
    assert throughput.take(2) == pytest.approx(said(120.0, 0.0)), "where none wrote, the rate is as before"
    assert throughput.take(0) == pytest.approx(said(120.0, 0.0))


def said(rate: float, busy: float) -> dict[str, float]:
    return {"rollout_tokens_per_second": rate, "rollout_busy": busy}


def test_of_tokens_on_trial_the_share_that_was_drawn_is_told_where_there_are_some() -> None:
    throughput = Throughput(lambda: 0.0)
    throughput.note(0, Written(tokens=9, seconds=1.0, proposed=8, accepted=6))
    throughput.note(1, Written(tokens=1, seconds=1.0, proposed=8))
    assert throughput.take(2)["rollout_accepted"] == 6 / 16
    throughput.note(0, Written(tokens=9, seconds=1.0))
    assert "rollout_accepted" not in throughput.take(2)
