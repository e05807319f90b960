"""distinct-n and self-BLEU, by hand and at their bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.cluster.evaluation.studies.diversity import bleu, distinct, self_bleu

TEXTS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=2, max_size=5)


def test_distinct_counts_n_grams_of_all_texts() -> None:
    assert distinct([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert math.isnan(distinct([[1]], 2))


def test_bleu_is_that_of_its_paper() -> None:
    # "the the the the the the the" against two references has a clipped unigram precision of 2/7 (Papineni et al.).
    the, cat, is_, on, mat, there, a = range(7)
    references = [[the, cat, is_, on, the, mat], [there, is_, a, cat, on, the, mat]]
    assert bleu([the] * 7, references, 1) == pytest.approx(2 / 7)
    assert bleu([the] * 7, references, 2) == 0
    assert bleu([the, cat], references, 2) == pytest.approx(math.exp(1 - 6 / 2))


@given(TEXTS)
def test_self_bleu_lies_between_nothing_shared_and_everything(texts: list[list[int]]) -> None:
    assert 0 <= self_bleu(texts) <= 1
    assert self_bleu([texts[0]] * 3) == pytest.approx(1)
    assert self_bleu([[10], [11, 12], [13]]) == 0
