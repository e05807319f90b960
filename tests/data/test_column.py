"""A column is a tuple to whoever compares, adds, slices or hashes it, and an array to numpy."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.data.batch import Column
from lockstep.rl.types import Completion

NUMBERS = {
    np.int32: st.integers(-(2**31), 2**31 - 1),
    np.float32: st.floats(width=32, allow_nan=False),
    np.bool_: st.booleans(),
}


@st.composite
def drawn(draw: st.DrawFn) -> tuple[type, tuple[Any, ...], tuple[Any, ...]]:
    kind = draw(st.sampled_from(list(NUMBERS)))
    numbers = st.lists(NUMBERS[kind], max_size=9).map(tuple)
    same = st.builds(lambda number, count: (number,) * count, NUMBERS[kind], st.integers(0, 5))
    return kind, draw(numbers | same), draw(numbers)


@given(drawn(), st.slices(9))
def test_it_does_what_a_tuple_does(given: tuple[type, tuple[Any, ...], tuple[Any, ...]], part: slice) -> None:
    kind, one, other = given
    column, more = Column(one, kind), Column(other, kind)
    assert (column == one, column == more, hash(column)) == (True, one == other, hash(one))
    assert column[part] == one[part]
    assert [column[i] for i in range(len(one))] == list(column) == list(one)
    assert {type(number) for number in column} <= {type(number) for number in one}
    assert column + more == column + other == one + other
    assert one + more == one + other  # type: ignore[operator]
    assert (bool(column), len(column), repr(column)) == (bool(one), len(one), repr(one))
    assert isinstance(column + other, Column)
    assert column != list(one)
    assert column == pytest.approx(list(one)), "whoever else knows how to compare is asked"


@given(drawn())
def test_pickles_keep_every_bit(given: tuple[type, tuple[Any, ...], tuple[Any, ...]]) -> None:
    kind, numbers, _ = given
    column = Column(numbers, kind)
    read = pickle.loads(pickle.dumps(column, protocol=5))
    assert read.array.dtype == column.array.dtype == kind
    assert read.array.tobytes() == column.array.tobytes()


def test_numpy_gets_the_array_itself_and_nobody_changes_it() -> None:
    column = Column((1.5, 2.5), np.float32)
    assert np.shares_memory(np.asarray(column), column.array)
    assert np.asarray(column, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(column)[0] = 3.0


@pytest.mark.parametrize(("version", "bytes_per_token"), [(range(10_000), 12), ([7] * 10_000, 8)])
def test_a_completion_takes_four_bytes_a_number(version: list[int], bytes_per_token: int) -> None:
    """Log-probabilities, tokens and versions; what is the same for all tokens takes nothing."""
    rng = np.random.default_rng(0)
    logp = rng.standard_normal(10_000).astype(np.float32)
    completion = Completion(0, tuple(range(10_000)), logp, "", "stop", version, [0.0] * 10_000)  # type: ignore[arg-type]
    assert len(pickle.dumps(completion, protocol=5)) == pytest.approx(bytes_per_token * 10_000, abs=1_000)
    assert pickle.loads(pickle.dumps(completion, protocol=5)) == completion
