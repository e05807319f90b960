"""Packing loses no prediction and repeats none, whatever the prompts, budgets and ranks."""

import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.data.batch import COLUMNS, Sample, TokenBatch, sample, sequences_of
from lockstep.data.packing import Document, RowRules, documents, plan, plan_for_ranks, rows_for_ranks, share

PROMPTS = ([1], [2, 3], [2, 3, 4], [1, 1, 1, 1, 1, 1, 1])

Prediction = tuple[tuple[int, ...], int, int, tuple[float, ...]]
"""What is read, what is predicted, its number and its columns."""


@st.composite
def one_sample(draw: st.DrawFn) -> Sample:
    completion = draw(st.lists(st.integers(0, 9), min_size=1, max_size=7))
    number = st.sampled_from([0.0, 0.25, -1.5, 2.0])
    columns = {c: np.array(draw(st.lists(number, min_size=len(completion), max_size=len(completion)))) for c in COLUMNS}
    return sample(draw(st.sampled_from(PROMPTS)), completion, number=draw(st.integers(0, 1 << 40)), **columns)


many_samples = st.lists(one_sample(), min_size=1, max_size=12)


def naive_predictions(samples: Sequence[Sample]) -> Counter[Prediction]:
    """(everything read so far → next token, number, columns) for every token that has weight."""
    return Counter(
        ((*s.prompt.tolist(), *s.completion[:i].tolist()), int(s.completion[i]), s.number + i, columns)
        for s in samples
        for i in range(len(s.completion))
        if (columns := tuple(float(getattr(s, c)[i]) for c in COLUMNS))[0] != 0
    )


def contexts(row: TokenBatch) -> list[tuple[int, ...]]:
    """For each token of a row what it sees, itself included."""
    seen: list[tuple[int, ...]] = []
    for prompt, *branches in row.documents:
        start = len(seen)
        seen += [tuple(row.tokens[start : start + i + 1].tolist()) for i in range(prompt)]
        for branch in branches:
            first, before = len(seen), tuple(row.tokens[start : start + prompt].tolist())
            seen += [before + tuple(row.tokens[first : first + i + 1].tolist()) for i in range(branch)]
    return seen


def predictions(rows: Sequence[TokenBatch]) -> Counter[Prediction]:
    found: Counter[Prediction] = Counter()
    for row in rows:
        seen = contexts(row)
        for i, (predictor, target) in enumerate(zip(row.predictors, row.targets, strict=True)):
            columns = tuple(float(getattr(row, c)[i]) for c in COLUMNS)
            found[seen[predictor], int(target), int(row.numbers[i]), columns] += 1
    return found


def packed(chosen: Sequence[Document], **options: Any) -> list[TokenBatch]:
    return [planned.assembled() for planned in plan(chosen, **options)]


@given(many_samples, st.integers(1, 60), st.sampled_from([1, 8, 32]), st.booleans())
def test_packing_keeps_every_prediction(samples: list[Sample], budget: int, multiple: int, equal: bool) -> None:
    rows = packed(documents(samples), budget=budget, multiple=multiple, equal=equal)
    assert predictions(rows) == naive_predictions(samples)


@given(many_samples, st.integers(1, 60), st.sampled_from([1, 8, 32]), st.booleans())
def test_rows_keep_to_their_budget_and_shape(samples: list[Sample], budget: int, multiple: int, equal: bool) -> None:
    rows = packed(documents(samples), budget=budget, multiple=multiple, equal=equal)
    for row in rows:
        real = [d for d in row.documents if len(d) > 1]  # padding is the only document without branches
        assert len(real) == 1 or sum(map(sum, real)) <= budget
        assert len(row.tokens) == len(row.positions) == sum(map(sum, row.documents))
        assert len(row.tokens) % multiple == 0
        assert row.positions.tolist() == [len(c) - 1 for c in contexts(row)]
        assert (row.weight != 0).all()
    if equal:
        assert len({len(row.tokens) for row in rows}) == 1
    else:
        assert all(len(r.tokens) - sum(sum(d) for d in r.documents if len(d) > 1) < multiple for r in rows)


def test_padding_is_a_document_that_predicts_nothing() -> None:
    (row,) = packed(documents([sample([7, 8], [9, 10], weight=0.5)]), budget=10, multiple=8)
    assert row.documents == ((2, 1), (5,))
    assert row.tokens.tolist() == [7, 8, 9, 0, 0, 0, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert row.predictors.tolist() == [1, 2]
    assert row.targets.tolist() == [9, 10]


def test_tokens_of_no_weight_are_read_but_not_predicted() -> None:
    (row,) = packed(documents([sample([1], [2, 3, 4], weight=np.array([0, 1, 0]))]), budget=9, multiple=1)
    assert row.tokens.tolist() == [1, 2, 3]
    assert (row.predictors.tolist(), row.targets.tolist()) == ([1], [3])


@given(many_samples)
def test_documents_gather_equal_prompts_in_order(samples: list[Sample]) -> None:
    found = documents(samples)
    prompts = [d.samples[0].prompt.tolist() for d in found]
    assert prompts == [list(p) for p in dict.fromkeys(tuple(s.prompt.tolist()) for s in samples)]
    for document, prompt in zip(found, prompts, strict=True):
        assert [id(s) for s in document.samples] == [id(s) for s in samples if s.prompt.tolist() == prompt]
        assert len(document) == len(prompt) + sum(len(s.completion) - 1 for s in document.samples)


@given(many_samples, st.integers(1, 6))
def test_ranks_share_all_documents_evenly(samples: list[Sample], parts: int) -> None:
    found = documents(samples)
    shares = share(found, parts)
    assert sorted(id(d) for part in shares for d in part) == sorted(map(id, found))
    loads = [sum(d.cost for d in part) for part in shares]
    assert max(loads) - min(loads) <= max(d.cost for d in found)


@given(many_samples, st.integers(1, 6), st.booleans())
def test_rows_of_all_ranks_hold_the_global_batch(samples: list[Sample], ranks: int, equal: bool) -> None:
    rows = rows_for_ranks(samples, RowRules(ranks=ranks, budget=20, equal=equal))
    assert len(rows) == ranks
    assert all(rows)
    assert predictions([row for part in rows for row in part]) == naive_predictions(samples)


def test_a_rank_without_documents_gets_a_silent_row() -> None:
    rows = rows_for_ranks([sample([1, 2], [3, 4]), sample([1, 2], [5])], RowRules(ranks=3, budget=64))
    assert [sum(len(r.targets) for r in part) for part in rows] == [3, 0, 0]
    assert all(len(part) == 1 and len(part[0].tokens) for part in rows)


@pytest.mark.parametrize(("prompt", "completion"), [([], [1]), ([1], []), ([], [])])
def test_a_sample_needs_a_prompt_and_a_completion(prompt: list[int], completion: list[int]) -> None:
    with pytest.raises(ValueError, match=f"has {len(prompt)} and {len(completion)} tokens"):
        sample(prompt, completion)


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        sample([1], [2, 3], weight=np.ones(3, np.float32))


def test_nothing_to_pack_gives_no_rows() -> None:
    assert plan([], budget=8, equal=True) == []
    assert Document((sample([1, 2], [3]),)).branches == [0]


@given(many_samples, st.integers(1, 60), st.integers(1, 4))
def test_documents_count_the_same_however_they_are_packed(samples: list[Sample], budget: int, ranks: int) -> None:
    expected = [np.float32(sum(float(s.weight.sum()) for s in d.samples)) for d in documents(samples, budget)]
    found = []
    for row in (row for rows in rows_for_ranks(samples, RowRules(ranks=ranks, budget=budget)) for row in rows):
        document, weight = sequences_of(row)
        assert [int((document == d).sum()) for d in range(len(weight))] == [sum(d) for d in row.documents]
        assert (np.diff(document) >= 0).all()
        found += weight[weight != 0].tolist()
    assert sorted(found) == sorted(w for w in expected if w != 0)


@given(many_samples, st.sampled_from([RowRules(2, 20, multiple=4), RowRules(3, 9, equal=True, count=2, in_step=True)]))
def test_a_rank_assembles_the_rows_that_were_planned(samples: list[Sample], rules: RowRules) -> None:
    read = [pickle.loads(pickle.dumps(planned, protocol=5)) for planned in plan_for_ranks(samples, rules)]
    for planned, rows in zip(read, rows_for_ranks(samples, rules), strict=True):
        assert [pickle.dumps(each.assembled()) for each in planned] == [pickle.dumps(row) for row in rows]


def test_what_is_the_same_for_all_tokens_takes_no_memory() -> None:
    length = 100_000
    logp = np.linspace(-1, 0, length, dtype=np.float32)
    made = sample([1], range(length), weight=np.full(length, 0.25), advantage=-0.5, old_logp=logp)
    assert made.weight.strides == made.advantage.strides == made.returns.strides == (0,)
    assert np.shares_memory(made.old_logp, logp)
    assert np.shares_memory(made.proximal_logp, logp)
    assert len(pickle.dumps(made, protocol=5)) == pytest.approx(8 * length, abs=1000), "tokens and log-probabilities"
    zeros = np.array([0.0, -0.0, 0.0], np.float32)
    assert sample([1], [2, 3, 4], value=zeros).value.tobytes() == zeros.tobytes(), "signs of zeros are bits"
