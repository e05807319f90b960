"""Draws against the distributions that they should follow, and the random numbers behind them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lockstep.model.ops.cpu import kernels
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.sampling.sampler import Draw, Row, _inverted, _weights, draw, likeliest, over_support, uniforms

DRAWS = 6_000
LOGITS = torch.tensor([1.5, -0.3, 0.2, 2.0, -4.0, 0.9, 1.1, float("-inf"), 0.0, -1.0])
PROMPT, COMPLETION = (3, 5, 5), (0, 6, 0, 0)
"""What penalties look at."""


def naive_distribution(
    logits: Tensor, config: SamplingParams, prompt: Sequence[int] = (), completion: Sequence[int] = ()
) -> np.ndarray:
    """Penalties, bias, softmax at the temperature; the k likeliest, of those up to top_p, of those from min_p on."""
    z = logits.double().numpy().copy()
    for token in {*prompt, *completion}:
        z[token] = z[token] / config.repetition_penalty if z[token] > 0 else z[token] * config.repetition_penalty
    for token in set(completion):
        z[token] -= config.presence_penalty + completion.count(token) * config.frequency_penalty
    for token, bias in config.logit_bias.items():
        z[token] += bias
    p = np.exp(z / config.temperature - (z / config.temperature).max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = list(order[: config.top_k or len(p)])
    inside = p[kept] / p[kept].sum()
    total, nucleus = 0.0, []
    for token, share in zip(kept, inside, strict=True):
        if total >= config.top_p:
            break
        nucleus.append(token)
        total += share
    nucleus = [token for token in nucleus if p[token] >= config.min_p * p.max()]
    out = np.zeros_like(p)
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


def drawn(logits: Tensor, numbers: Sequence[float] | np.ndarray, config: SamplingParams, **context: Any) -> Draw:
    return draw(logits, [Row(config, float(u), **context) for u in numbers])


def frequencies(logits: Tensor, config: SamplingParams, **context: Any) -> np.ndarray:
    numbers = uniforms([11] * DRAWS, range(DRAWS), [3] * DRAWS)
    tokens = drawn(logits.expand(DRAWS, -1), numbers, config, **context).tokens
    return np.bincount(tokens.numpy(), minlength=len(logits))


def chi_squared_bound(freedom: int) -> float:
    """Exceeded once in 10,000 times (Wilson & Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_k": 1},
    {"top_k": 100},
    {"top_p": 0.8},
    {"top_p": 0.3},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"frequency_penalty": 0.7},
    {"presence_penalty": 1.3},
    {"presence_penalty": -0.8, "frequency_penalty": -0.2},
    {"logit_bias": {4: 6.0, 3: -2.0, 8: -20.0}},
    {"temperature": 1.7, "top_k": 6},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.85},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.15},
    {"top_k": 4, "min_p": 0.3, "frequency_penalty": 0.4},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.3, "logit_bias": {9: 3.0}},
]


def follows(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether counts may be draws from a distribution."""
    possible = expected > 0
    wanted = counts.sum() * expected[possible]
    statistic = ((counts[possible] - wanted) ** 2 / wanted).sum()
    return not counts[~possible].any() and bool(statistic < chi_squared_bound(max(1, possible.sum() - 1)))


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    config = SamplingParams(**settings)
    expected = naive_distribution(LOGITS, config, PROMPT, COMPLETION)
    assert follows(frequencies(LOGITS, config, prompt=PROMPT, completion=COMPLETION), expected)


def test_tokens_that_would_end_too_early_are_not_drawn() -> None:
    config = SamplingParams(top_p=0.9)
    counts = frequencies(LOGITS, config, forbidden=(3, 6))
    expected = naive_distribution(LOGITS, SamplingParams(logit_bias={3: -1e9, 6: -1e9}, top_p=0.9))
    assert not counts[[3, 6]].any()
    assert follows(counts, expected)


def test_rows_of_one_batch_are_drawn_as_each_asks() -> None:
    """With every option in one batch each row gets the token, and the numbers, that it gets alone."""
    configs = [SamplingParams(**settings, support=True) for settings in OPTIONS] + [SamplingParams(temperature=0)]
    many = torch.randn(40 * len(configs), 3000, generator=torch.Generator().manual_seed(4)) * 3
    many[:, 100:900] = many[:, 100:900].round()  # many equal ones
    rows = [Row(configs[i % len(configs)], (i * 0.6180339887) % 1, PROMPT, COMPLETION) for i in range(len(many))]
    together = draw(many, rows)
    for i in range(0, len(many), 7):
        alone = draw(many[i : i + 1], rows[i : i + 1])
        assert alone.tokens[0] == together.tokens[i]
        assert alone.supports[0] == together.supports[i]
        torch.testing.assert_close(alone.sampling_logp[0], together.sampling_logp[i], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_sampling_log_probabilities_are_those_of_the_distribution(settings: dict[str, Any]) -> None:
    config = SamplingParams(**settings, support=True)
    found = drawn(LOGITS.expand(50, -1), np.linspace(0, 0.999, 50), config, prompt=PROMPT, completion=COMPLETION)
    if Row(config, 0.0).is_plain:
        assert found.sampling_logp.isnan().all()
        return
    expected = naive_distribution(LOGITS, config, PROMPT, COMPLETION)
    np.testing.assert_allclose(found.sampling_logp.exp(), expected[found.tokens], rtol=1e-5)
    assert set(found.supports) == {tuple(np.nonzero(expected)[0].tolist())}


@pytest.mark.parametrize(
    "settings", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.4}, {"top_k": 5, "top_p": 0.8}], ids=str
)
def test_a_support_that_is_replayed_makes_the_importance_ratio_exact(settings: dict[str, Any]) -> None:
    """E under the old policy's truncated draws of the ratio is 1 for any new policy, if both have the same support."""
    config = SamplingParams(**settings, temperature=1.4, support=True)
    found = drawn(LOGITS.expand(DRAWS, -1), uniforms([3] * DRAWS, range(DRAWS), [0] * DRAWS), config)
    old = over_support(LOGITS.expand(DRAWS, -1), found.supports, found.tokens, 1.4)
    torch.testing.assert_close(old, found.sampling_logp, rtol=1e-5, atol=1e-6)
    new_logits = LOGITS.flip(0).nan_to_num(neginf=-1.0)
    ratios = (over_support(new_logits.expand(DRAWS, -1), found.supports, found.tokens, 1.4) - old).exp()
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / DRAWS**0.5
    whole = over_support(LOGITS[None], [()], torch.tensor([3]), 1.0)
    torch.testing.assert_close(whole, LOGITS.log_softmax(-1)[3:4])


def test_a_nucleus_may_be_wider_than_the_candidates() -> None:
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * 0.1
    for top_p in (0.3, 0.9):
        config = SamplingParams(top_p=top_p, support=True)
        for line, support in zip(logits, drawn(logits, [0.1, 0.9], config).supports, strict=True):
            assert support == tuple(np.nonzero(naive_distribution(line, config))[0].tolist())


def test_the_likeliest_are_reported_under_the_policy() -> None:
    row = Row(SamplingParams(temperature=2, logprobs=3, top_k=1), 0.0)
    found = likeliest(LOGITS, (LOGITS / 2).logsumexp(-1), row)
    expected = (LOGITS / 2).log_softmax(-1)
    assert [token for token, _ in found] == [3, 0, 6]
    assert [p for _, p in found] == pytest.approx(expected[[3, 0, 6]].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "shares"),
    [(1.0, (0.659, 0.242, 0.099)), (0.5, (0.864, 0.117, 0.019)), (2.0, (0.502, 0.304, 0.194))],
)
def test_a_worked_example(temperature: float, shares: tuple[float, ...]) -> None:
    logits = torch.tensor([2.0, 1.0, 0.1])
    config = SamplingParams(temperature=temperature)
    np.testing.assert_allclose(naive_distribution(logits, config), shares, atol=5e-4)
    np.testing.assert_allclose(frequencies(logits, config) / DRAWS, shares, atol=0.025)
    ends = drawn(logits.expand(3, -1), [0.0, 0.9 * shares[0] + 0.1 * (1 - shares[2]), 1 - 1e-9], config).tokens
    assert ends[[0, 2]].tolist() == [0, 2]


def test_greedy_takes_the_likeliest_after_penalties() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    found = drawn(logits, np.linspace(0, 1, 50, endpoint=False), SamplingParams(temperature=0))
    assert torch.equal(found.tokens, logits.argmax(-1))
    assert (found.sampling_logp == 0).all()
    biased = SamplingParams(temperature=0, logit_bias={7: 100.0}, top_k=3, top_p=0.5)
    assert drawn(logits, [0.5] * 50, biased).tokens.tolist() == [7] * 50


@given(st.integers(0, 7), st.integers(0, 2**53 - 1))
def test_a_token_of_probability_zero_is_never_drawn(impossible: int, number: int) -> None:
    logits = torch.zeros(1, 8)
    logits[0, impossible:] = float("-inf") if impossible else 0.0
    token = drawn(logits, [number * 2.0**-53], SamplingParams()).tokens.item()
    assert impossible == 0 or token < impossible


def test_the_ends_of_the_unit_interval_draw_the_first_and_last_possible_token() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]]).expand(2, -1)
    assert drawn(logits, [0.0, 1 - 2.0**-53], SamplingParams()).tokens.tolist() == [1, 2]


@given(
    st.integers(0, 2**63), st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 10**6)), min_size=1, max_size=20)
)
def test_uniforms_depend_on_seed_sample_and_position_only(seed: int, places: list[tuple[int, int]]) -> None:
    together = uniforms([seed] * len(places), [s for s, _ in places], [p for _, p in places])
    alone = [uniforms([seed], [s], [p]).item() for s, p in places]
    assert together.tolist() == alone
    assert all(0 <= u < 1 for u in alone)
    assert len(set(alone)) == len(set(places))


@pytest.mark.parametrize("size", [5, 16, 4001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_draws_what_torch_draws(size: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(400, size, generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    logits[:, size // 2] = float("-inf")
    shares = uniforms([1] * 400, range(400), [0] * 400)
    found = kernels.draw(logits, range(400), [0.7] * 400, shares.tolist())
    expected = _inverted(_weights(logits.float() / 0.7), torch.from_numpy(shares))[0]
    assert (found == expected).sum() >= 399, "one draw in many may lie on an edge"
    assert kernels.draw(logits, [7, 3], [0.7, 0.7], shares[[7, 3]].tolist()).tolist() == found[[7, 3]].tolist()


@pytest.mark.parametrize("axis", ["seed", "sample", "position"])
def test_uniforms_look_uniform_and_independent_along_each_axis(axis: str) -> None:
    count = 8192
    run = list(range(count))
    if axis == "seed":
        numbers = uniforms(run, [0] * count, [0] * count)
    elif axis == "sample":
        numbers = uniforms([5] * count, run, [2] * count)
    else:
        numbers = uniforms([5] * count, [2] * count, run)
    counts = np.histogram(numbers, 64, (0, 1))[0]
    assert ((counts - count / 64) ** 2 / (count / 64)).sum() < chi_squared_bound(63)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 4 / count**0.5
    assert len(set(numbers)) == count


def test_uniforms_of_neighbours_are_not_related() -> None:
    count = 4096
    seeds, samples, positions = (uniforms([s] * count, range(count), [p] * count) for s, p in ((0, 0), (1, 0), (0, 1)))
    turned = uniforms([0] * count, [0] * count, range(count))
    table = np.corrcoef([seeds, samples, positions, turned])
    assert np.abs(table[~np.eye(4, dtype=bool)]).max() < 4 / 4096**0.5


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1), ("top_p", 0), ("top_k", -1), ("max_new_tokens", 0), ("min_p", 2), ("repetition_penalty", 0)],
)
def test_settings_that_make_no_sense_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        SamplingParams(**{key: value})
