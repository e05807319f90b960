"""Draws against the distributions that they should follow, and the random numbers behind them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lockstep.rl.rollout.sampler import draw, uniforms
from lockstep.rl.rollout.sampling import SamplingConfig

DRAWS = 20_000
LOGITS = torch.tensor([1.5, -0.3, 0.2, 2.0, -4.0, 0.9, 1.1, float("-inf"), 0.0, -1.0])


def naive_distribution(logits: Tensor, config: SamplingConfig) -> np.ndarray:
    """Softmax at the temperature; the k likeliest, of those the likeliest up to top_p, renormalised."""
    p = (logits.double() / config.temperature).softmax(-1).numpy()
    order = np.argsort(-p)
    kept = list(order[: config.top_k or len(p)])
    inside = p[kept] / p[kept].sum()
    total, nucleus = 0.0, []
    for token, share in zip(kept, inside, strict=True):
        if total >= config.top_p:
            break
        nucleus.append(token)
        total += share
    out = np.zeros_like(p)
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


def frequencies(logits: Tensor, config: SamplingConfig) -> np.ndarray:
    numbers = uniforms(11, list(range(DRAWS)), [3] * DRAWS)
    tokens = draw(logits.expand(DRAWS, -1), numbers, config).tokens
    return np.bincount(tokens.numpy(), minlength=len(logits))


def chi_squared_bound(freedom: int) -> float:
    """Exceeded once in 10,000 times (Wilson & Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 1},
        {"top_k": 100},
        {"top_p": 0.8},
        {"top_p": 0.3},
        {"temperature": 1.7, "top_k": 6},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.85},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings: dict[str, float]) -> None:
    config = SamplingConfig(**settings)
    expected, counts = naive_distribution(LOGITS, config), frequencies(LOGITS, config)
    possible = expected > 0
    assert not counts[~possible].any()
    wanted = DRAWS * expected[possible]
    statistic = ((counts[possible] - wanted) ** 2 / wanted).sum()
    assert statistic < chi_squared_bound(max(1, possible.sum() - 1))


@pytest.mark.parametrize(
    ("temperature", "shares"),
    [(1.0, (0.659, 0.242, 0.099)), (0.5, (0.864, 0.117, 0.019)), (2.0, (0.502, 0.304, 0.194))],
)
def test_a_worked_example(temperature: float, shares: tuple[float, ...]) -> None:
    logits = torch.tensor([2.0, 1.0, 0.1])
    config = SamplingConfig(temperature=temperature)
    np.testing.assert_allclose(naive_distribution(logits, config), shares, atol=5e-4)
    np.testing.assert_allclose(frequencies(logits, config) / DRAWS, shares, atol=0.012)
    every = draw(logits.expand(3, -1), torch.tensor([0.0, 0.9 * shares[0] + 0.1 * (1 - shares[2]), 1 - 1e-9]), config)
    np.testing.assert_allclose(every.logp[[0, 2]].exp(), (shares[0], shares[2]), atol=5e-4)


def test_greedy_takes_the_likeliest_and_reports_it_at_temperature_one() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    drawn = draw(logits, torch.rand(50), SamplingConfig(temperature=0))
    assert torch.equal(drawn.tokens, logits.argmax(-1))
    assert torch.allclose(drawn.logp, logits.log_softmax(-1).amax(-1), atol=1e-6)


@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_p": 0.4}], ids=str)
def test_log_probabilities_have_the_temperature_but_no_truncation(truncation: dict[str, float]) -> None:
    logits = torch.randn(200, 20, generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(temperature=0.6, **truncation)
    drawn = draw(logits, uniforms(0, list(range(200)), [0] * 200), config)
    expected = (logits.double() / 0.6).log_softmax(-1).gather(1, drawn.tokens[:, None])[:, 0]
    assert torch.allclose(drawn.logp.double(), expected, atol=1e-5)


@given(st.integers(0, 7), st.integers(0, 2**53 - 1))
def test_a_token_of_probability_zero_is_never_drawn(impossible: int, number: int) -> None:
    logits = torch.zeros(1, 8)
    logits[0, impossible:] = float("-inf") if impossible else 0.0
    token = draw(logits, torch.tensor([number * 2.0**-53], dtype=torch.float64), SamplingConfig()).tokens.item()
    assert impossible == 0 or token < impossible


def test_the_ends_of_the_unit_interval_draw_the_first_and_last_possible_token() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]]).expand(2, -1)
    numbers = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, numbers, SamplingConfig()).tokens.tolist() == [1, 2]


@given(
    st.integers(0, 2**63), st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 10**6)), min_size=1, max_size=20)
)
def test_uniforms_depend_on_seed_sample_and_position_only(seed: int, places: list[tuple[int, int]]) -> None:
    together = uniforms(seed, [s for s, _ in places], [p for _, p in places])
    alone = [uniforms(seed, [s], [p]).item() for s, p in places]
    assert together.tolist() == alone
    assert all(0 <= u < 1 for u in alone)
    assert len(set(alone)) == len(set(places))


@pytest.mark.parametrize("axis", ["seed", "sample", "position"])
def test_uniforms_look_uniform_and_independent_along_each_axis(axis: str) -> None:
    count = 8192
    run = list(range(count))
    if axis == "seed":
        numbers = np.array([uniforms(s, [0], [0]).item() for s in run])
    elif axis == "sample":
        numbers = uniforms(5, run, [2] * count).numpy()
    else:
        numbers = uniforms(5, [2] * count, run).numpy()
    counts = np.histogram(numbers, 64, (0, 1))[0]
    assert ((counts - count / 64) ** 2 / (count / 64)).sum() < chi_squared_bound(63)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 4 / count**0.5
    assert len(set(numbers)) == count


def test_uniforms_of_neighbours_are_not_related() -> None:
    seeds, samples, positions = (uniforms(s, range(4096), [p] * 4096).numpy() for s, p in ((0, 0), (1, 0), (0, 1)))
    turned = uniforms(0, [0] * 4096, range(4096)).numpy()
    table = np.corrcoef([seeds, samples, positions, turned])
    assert np.abs(table[~np.eye(4, dtype=bool)]).max() < 4 / 4096**0.5


@pytest.mark.parametrize(("key", "value"), [("temperature", -1), ("top_p", 0), ("top_k", -1), ("max_new_tokens", 0)])
def test_settings_that_make_no_sense_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        SamplingConfig(**{key: value})
