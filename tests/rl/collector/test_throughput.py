"""Tokens per second and the busy share of engines, by a clock that the test moves."""

import pytest

from lockstep.rl.collector.rollout_service import Throughput


def test_rates_are_over_the_seconds_of_engines_and_shares_over_all_time() -> None:
    now = [100.0]
    throughput = Throughput(lambda: now[0])
    throughput.note(0, 300, 2.0)
    throughput.note(0, 100, 2.0)
    throughput.note(1, 90, 3.0)
    now[0] = 110.0
    assert throughput.take(2) == pytest.approx((400 / 4 + 90 / 3, 7 / 20))
    now[0] = 110.5  # a step that waits for nothing, since others wrote ahead, has no endless rate
    throughput.note(1, 60, 0.5)
    assert throughput.take(2) == pytest.approx((120.0, 0.5))
    now[0] = 120.0
    assert throughput.take(2) == pytest.approx((120.0, 0.0)), "where none wrote, the rate is as before"
    assert throughput.take(0) == pytest.approx((120.0, 0.0))
