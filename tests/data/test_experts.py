"""Recorded experts stay with their tokens: through pickles, packed rows, trees of completions and context ranks."""

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.data.batch import Experts, Sample, part, sample
from lockstep.data.packing import Document, RowRules, plan_for_ranks
from tests.data.test_batch import PROMPTS


@st.composite
def recorded_samples(draw: st.DrawFn) -> list[Sample]:
    """Samples of which some have a record, of all tokens but the last or of fewer, in any order and odd sizes."""
    layers, k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([np.uint8, np.int16]))
    found = []
    for number in range(draw(st.integers(1, 9))):
        prompt, completion = draw(st.sampled_from(PROMPTS)), [number] * draw(st.integers(1, 7))
        known = draw(st.one_of(st.none(), st.integers(0, len(prompt) + len(completion))))
        experts: Experts | None = None
        if known is not None:
            size = known * layers * k
            experts = np.random.default_rng(number).integers(0, 256, size).astype(dtype).reshape(known, layers, k)
        found.append(sample(prompt, completion, number=number, experts=experts))
    return found


def naive(documents: Sequence[Document]) -> list[list[list[int]] | None]:
    """The record of each token of a row; None where there is none."""

    def record(each: Sample, place: int) -> list[list[int]] | None:
        return each.experts[place].tolist() if each.experts is not None and place < len(each.experts) else None

    found = []
    for document in documents:
        prompt = len(document.samples[0].prompt)
        speaks = [s for s in document.samples if s.experts is not None] or document.samples
        found += [record(speaks[0], place) for place in range(prompt)]
        found += [record(s, prompt + i) for s in document.samples for i in range(len(s.completion) - 1)]
    return found


@given(recorded_samples(), st.integers(1, 3), st.integers(1, 24))
def test_records_stay_with_their_tokens(samples: list[Sample], ranks: int, budget: int) -> None:
    sent: list[Sample] = pickle.loads(pickle.dumps(samples))
    for before, after in zip(samples, sent, strict=True):
        assert (before.experts is None) == (after.experts is None)
        if before.experts is not None and after.experts is not None:
            assert before.experts.dtype == after.experts.dtype
            np.testing.assert_array_equal(before.experts, after.experts)
    for planned in (row for rows in plan_for_ranks(sent, RowRules(ranks, budget, multiple=4)) for row in rows):
        row, expected = planned.assembled(), naive(planned.documents)
        if row.experts is None:
            assert all(s.experts is None for s in samples)
            continue
        assert any(s.experts is not None for s in samples)
        assert row.experts.dtype == np.int16
        found = [None if (each < 0).all() else each.tolist() for each in row.experts]
        assert found == expected + [None] * (len(row.tokens) - len(expected))
        places = np.arange(len(row.tokens))[::-2]
        held = part(row, places).experts
        assert held is not None
        np.testing.assert_array_equal(held, row.experts[places])


def test_rows_without_records_have_no_column() -> None:
    [[planned]] = plan_for_ranks([sample([1, 2], [3, 4])], RowRules())
    row = planned.assembled()
    assert row.experts is None
    assert part(row, np.arange(3)).experts is None


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_record_of_a_prompt_that_completions_share_counts(first: int) -> None:
    experts = [np.full((3, 1, 2), number, np.uint8) for number in (5, 6)]
    both = [sample([1, 2], [3, 4], experts=e) for e in (experts[first], experts[1 - first])]
    [[planned]] = plan_for_ranks(both, RowRules())
    row = planned.assembled()
    assert row.experts is not None
    assert row.experts[:4, 0, 0].tolist() == [5 + first, 5 + first, 5 + first, 6 - first]
