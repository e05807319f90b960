"""Documents longer than a row are split by their completions, no more than needed; data ranks share them by cost."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.data.batch import PREDICTED, Sample, TokenBatch, sample
from lockstep.data.packing import Document, RowRules, documents, row, rows_for_ranks, share, split
from tests.data.test_batch import many_samples, naive_predictions, predictions

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=6)


def document(prompt: int, completions: Sequence[int]) -> Document:
    """Completions of so many tokens each, which name their sample."""
    return Document(tuple(sample(range(prompt), [i] * n) for i, n in enumerate(completions)))


def names(parts: Sequence[Document]) -> list[list[int]]:
    return [[int(s.completion[0]) for s in part.samples] for part in parts]


def fewest(document: Document, budget: int) -> int:
    """Parts that are needed at least, of all ways to divide the samples."""
    prompt, count = len(document.samples[0].prompt), len(document.samples)
    best = count
    for way in product(range(count), repeat=count):
        loads = [prompt + sum(b for b, place in zip(document.branches, way, strict=True) if place == p) for p in {*way}]
        alone = [way.count(p) == 1 for p in {*way}]
        if all(load <= budget or single for load, single in zip(loads, alone, strict=True)):
            best = min(best, len({*way}))
    return best


@given(st.integers(1, 20), LENGTHS, st.integers(1, 90))
def test_parts_are_within_the_budget_and_few(prompt: int, completions: list[int], budget: int) -> None:
    whole = document(prompt, completions)
    parts = split(whole, budget)
    assert sorted(n for part in names(parts) for n in part) == list(range(len(completions)))
    assert all(part.samples[0].prompt.tolist() == list(range(prompt)) for part in parts)
    assert all(len(part) <= budget or len(part.samples) == 1 for part in parts)
    assert [split(part, budget) for part in parts] == [[part] for part in parts], "splitting again changes nothing"
    if len(whole) <= budget:
        assert parts == [whole]
    if len(completions) <= 5:
        assert len(parts) <= fewest(whole, budget) + 1


def test_parts_are_full_and_keep_the_order_of_samples() -> None:
    assert names(split(document(100, [301, 301, 301, 301]), 1000)) == [[0, 1, 2], [3]]
    assert names(split(document(10, [51, 11, 41, 21]), 80)) == [[0, 3], [1, 2]]
    parts = split(document(10, [31, 31, 101, 31]), 60)
    assert names(parts) == [[0], [1], [2], [3]]
    assert [len(part) for part in parts] == [40, 40, 110, 40], "one is longer by itself"
    assert names(split(document(70, [3, 1, 3, 1]), 72)) == [[0, 1, 3], [2]], "a completion of one token reads nothing"


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(1, 9)), min_size=1, max_size=8))
def test_samples_that_are_compared_stay_in_one_row(drawn: list[tuple[int, int, int]]) -> None:
    samples = [sample([1, 2], [7] * n, group=g, preference=p) for g, p, n in drawn]
    rows = rows_for_ranks(samples, RowRules(budget=6, multiple=1))[0]
    for group in {g for g, _, _ in drawn}:
        among = {p for g, p, _ in drawn if g == group}
        held = [r for r in rows if (r.members.group == group).any()]
        if len(among) > 1:
            assert len(held) == 1
            assert (held[0].members.group == group).sum() == sum(g == group for g, _, _ in drawn)


@given(many_samples, st.integers(1, 40), st.integers(1, 3))
def test_rows_hold_no_more_than_the_budget_and_every_prediction(samples: list[Sample], budget: int, ranks: int) -> None:
    rows = [r for part in rows_for_ranks(samples, RowRules(ranks, budget, multiple=1)) for r in part]
    assert predictions(rows) == naive_predictions(samples)
    assert all(len(r.tokens) <= budget or len(r.members.group) == 1 for r in rows)


def test_a_group_of_long_completions_is_rows_within_the_budget() -> None:
    """16 · 8,192 tokens were one row of 131,264 under a budget of 8,192."""
    samples = [sample(range(192), np.full(8193, i)) for i in range(16)]
    rows = rows_for_ranks(samples, RowRules(ranks=4, budget=8192))
    assert [[len(r.tokens) for r in part] for part in rows] == [[8384] * 4] * 4
    half = [sample(range(192), np.full(4001, i)) for i in range(16)]
    assert {len(r.tokens) for part in rows_for_ranks(half, RowRules(ranks=4, budget=8192)) for r in part} == {8192}


def short_groups() -> list[Sample]:
    """A batch of GRPO: 32 prompts with 8 short completions each."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 500, draw.integers(30, 90)) for _ in range(32)]
    return [sample(p, draw.integers(0, 500, draw.integers(5, 65))) for p in prompts for _ in range(8)]


def naive_rows(samples: Sequence[Sample], ranks: int, budget: int, multiple: int) -> list[list[TokenBatch]]:
    """Whole groups, longest first, each to the rank with the fewest tokens, in its row until the next is too much."""
    rows: list[list[list[Document]]] = [[[]] for _ in range(ranks)]
    for each in sorted(documents(samples), key=len, reverse=True):
        mine = min(rows, key=lambda part: sum(len(d) for chosen in part for d in chosen))
        if mine[-1] and sum(map(len, mine[-1])) + len(each) > budget:
            mine.append([])
        mine[-1].append(each)
    return [[row(chosen, -(-sum(map(len, chosen)) // multiple) * multiple) for chosen in part] for part in rows]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_of_short_groups_are_those_of_whole_groups_shared_by_tokens(ranks: int) -> None:
    """So that runs whose groups fit into rows have the bits that they had before groups could be split."""
    samples = short_groups()
    expected = naive_rows(samples, ranks, 2048, 32)
    found = rows_for_ranks(samples, RowRules(ranks, budget=2048))
    assert sum(map(len, found)) >= 6
    for mine, theirs in zip(found, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.documents == other.documents
            for name in ("tokens", "positions", "predictors", *PREDICTED):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_alike_where_lengths_have_a_long_tail(ranks: int) -> None:
    """Few long completions beside many short ones of as many tokens: attention makes the long ones costlier."""
    draw = np.random.default_rng(1)
    found = [
        part
        for _ in range(64)
        for part in split(document(int(draw.integers(60, 600)), tail(draw.lognormal(7, 0.9, 8))), 8192)
    ]
    by_cost = [sum(d.cost for d in part) for part in share(found, ranks)]
    by_tokens = np.zeros(ranks)
    load = np.zeros(ranks)
    for each in sorted(found, key=len, reverse=True):
        lightest = int(load.argmin())
        load[lightest] += len(each)
        by_tokens[lightest] += each.cost
    assert imbalance(by_cost) < 0.002
    assert imbalance(by_cost) < imbalance(by_tokens) / 4


def tail(lengths: np.ndarray) -> list[int]:
    return np.clip(lengths, 2, 8192).astype(int).tolist()


def imbalance(costs: Sequence[float] | np.ndarray) -> float:
    """How much longer the ranks wait than if all had the same work."""
    return float(max(costs) / np.mean(costs) - 1)


def test_the_cost_of_a_document_counts_the_pairs_of_attention() -> None:
    """In whole tokens of the prompt and of each completion: 8,192 pairs are one token more."""
    whole = document(300, [201, 1, 1001, 11])
    pairs = [sum(range(1, 301)), sum(range(301, 501)), 0, sum(range(301, 1301)), sum(range(301, 311))]
    assert [n // 8192 for n in pairs] == [5, 9, 0, 97, 0]
    assert whole.cost == len(whole) + 5 + 9 + 97
    assert document(90, [60] * 8).cost == 90 + 8 * 59, "short ones cost their tokens"


def test_groups_stay_whole_where_a_loss_is_of_documents() -> None:
    samples = [sample([1, 2, 3], [4] * 5), sample([1, 2, 3], [5] * 5)]
    whole, parts = (
        rows_for_ranks(samples, RowRules(budget=8, multiple=1, splits=splits))[0] for splits in (False, True)
    )
    assert [row.documents for row in whole] == [((3, 4, 4),)]
    assert [row.documents for row in parts] == [((3, 4),), ((3, 4),)]
