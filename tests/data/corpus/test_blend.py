"""A mixture gives every source its exact share, and any part of it without what came before."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.data.corpus.blend import BOUND, Blend

weights_of_sources = st.lists(
    st.one_of(st.floats(1e-9, 1e9), st.integers(1, 9).map(float), st.just(0.1)), min_size=1, max_size=12
)


def naive(weights: list[float], samples: int) -> list[tuple[int, int]]:
    """The same tree, grown by searching for the two lightest, and each node counting what it has given."""
    exact = [Fraction(str(w)) for w in weights]
    nodes: list[dict[str, object]] = [{"weight": w, "source": i, "age": i} for i, w in enumerate(exact)]
    for age in range(len(nodes), 2 * len(nodes) - 1):
        light, heavy = sorted(nodes, key=lambda n: (n["weight"], n["age"]))[:2]
        nodes = [n for n in nodes if n is not light and n is not heavy]
        weight = light["weight"] + heavy["weight"]  # type: ignore[operator]
        nodes.append({"weight": weight, "first": heavy, "second": light, "seen": 0, "given": 0, "age": age})
    drawn = [0] * len(weights)
    result = []
    for _ in range(samples):
        node = nodes[0]
        while "source" not in node:
            node["seen"] += 1  # type: ignore[operator]
            share = node["first"]["weight"] / node["weight"]  # type: ignore[index]
            to_first = node["seen"] * share - node["given"] >= Fraction(1, 2)
            node["given"] += to_first  # type: ignore[operator]
            node = node["first" if to_first else "second"]  # type: ignore[assignment]
        source = node["source"]
        result.append((source, drawn[source]))  # type: ignore[index]
        drawn[source] += 1  # type: ignore[index]
    return result  # type: ignore[return-value]


@settings(max_examples=40)
@given(weights_of_sources, st.data())
def test_any_part_is_the_naive_sequence(weights: list[float], data: st.DataObject) -> None:
    expected = naive(weights, 60)
    mixture = Blend(weights)
    start = data.draw(st.integers(0, 60))
    stop = data.draw(st.integers(start, 60))
    sources, numbers = mixture.take(start, stop)
    assert list(zip(sources.tolist(), numbers.tolist(), strict=True)) == expected[start:stop]


@settings(max_examples=60)
@given(weights_of_sources, st.integers(0, 10**15))
def test_shares_are_kept_at_every_prefix(weights: list[float], samples: int) -> None:
    mixture = Blend(weights)
    counts = mixture.counts(samples)
    assert sum(counts) == samples
    exact = [Fraction(str(w)) for w in weights]
    for n, weight in zip(counts, exact, strict=True):
        assert abs(n - samples * weight / sum(exact)) < BOUND
    sources, numbers = mixture.take(samples, samples + 40)
    assert [int(numbers[sources == s].min(initial=n)) for s, n in enumerate(counts)] == counts
    after = [n + int((sources == s).sum()) for s, n in enumerate(counts)]
    assert after == mixture.counts(samples + 40)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 10**9))
def test_shares_are_exact_after_every_round(weights: list[int], rounds: int) -> None:
    assert Blend(list(map(float, weights))).counts(rounds * sum(weights)) == [rounds * w for w in weights]


def test_decimal_weights_are_exact() -> None:
    assert Blend([0.7, 0.2, 0.1]).counts(10**12) == [7 * 10**11, 2 * 10**11, 10**11]
    assert Blend([0.7, 0.2, 0.1]).shares == [Fraction(7, 10), Fraction(1, 5), Fraction(1, 10)]


@pytest.mark.parametrize("sources", [2, 50, 200])
def test_many_light_sources_beside_a_heavy_one_do_not_come_in_bursts(sources: int) -> None:
    weights = [float(sources)] + [1.0] * sources
    chosen, _ = Blend(weights).take(0, 4 * sources)
    heavy = np.cumsum(chosen == 0) - np.arange(1, 4 * sources + 1) / 2
    assert np.abs(heavy).max() <= 0.5
