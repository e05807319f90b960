"""A spike stands out of noise, slopes and earlier spikes; what is no number always is one."""

import math

import numpy as np
import pytest

from lockstep.model.training.loss_spikes import SpikeConfig, is_spike, spike_limit

CONFIG = SpikeConfig(window=64)


def falling(steps: int, noise: float, seed: int = 0) -> list[float]:
    """A loss as a run has it: from 11 towards 2.5 by a power of the step, with noise."""
    draw = np.random.default_rng(seed)
    step = np.arange(1, steps + 1)
    return (2.5 + 8.5 * step**-0.35 + noise * draw.standard_normal(steps)).tolist()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_no_number_is_a_spike_at_any_time(loss: float) -> None:
    assert is_spike(loss, [], CONFIG)
    assert is_spike(loss, falling(100, 0.02), CONFIG)


def test_the_limit_is_the_median_and_eight_robust_deviations() -> None:
    losses = [9.0, 2.0, 1.0, 4.0, 3.0]
    config = SpikeConfig(window=4, threshold=8)
    assert spike_limit(losses, config) == pytest.approx(2.5 + 8 * 1.4826 * 1.0)
    assert spike_limit(losses[:3], config) == math.inf


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.03, 0.3])
def test_a_falling_noisy_loss_has_no_spikes(noise: float) -> None:
    losses = falling(20_000, noise)
    assert not any(is_spike(losses[i], losses[max(0, i - 64) : i], CONFIG) for i in range(len(losses)))


@pytest.mark.parametrize(("step", "rise"), [(200, 1.5), (5000, 0.5)])
def test_a_rise_is_seen_even_after_another_one_has_passed_into_the_window(step: int, rise: float) -> None:
    losses = falling(step, 0.02)
    assert is_spike(losses[-1] + rise, losses, CONFIG)
    losses[-20:-10] = [12.0] * 10
    assert is_spike(losses[-1] + rise, losses, CONFIG)


def test_losses_that_repeat_make_no_spike_of_a_rounding_error() -> None:
    assert not is_spike(2.0000001, [2.0] * 64, CONFIG)
    assert is_spike(2.1, [2.0] * 64, CONFIG)
