"""A stream is its documents head to tail, epoch after epoch, and any part of it can be cut out alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.data.corpus.document_stream import DocumentStream, scrambled, split
from lockstep.data.corpus.indexed_dataset import BadIndexedDataset, IndexedDataset, Note
from lockstep.data.corpus.indexed_dataset_writer import IndexedDatasetWriter

# Reckoned with Python's integers, apart from numpy.
PINNED_BITS = [15902450069126510388, 3218355300484720975, 9348236017539013067]
PINNED_ORDER = [6, 1, 0, 5, 2, 7, 3, 4, 1, 6, 3, 7, 4, 5, 0, 2]


def store_of(path: Path, lengths: list[int]) -> IndexedDataset:
    """Documents of these lengths, every token its own place in the store."""
    writer = IndexedDatasetWriter(path, vocabulary=1 << 20)
    writer.add(np.arange(sum(lengths)), np.array(lengths, np.int64))
    writer.finish(Note("d", 1 << 20, 0, "m", writer.documents, writer.tokens))
    return IndexedDataset(path)


def stream_of(store: IndexedDataset, *, seed: int = 0) -> DocumentStream:
    return DocumentStream(store, np.arange(store.documents), vocabulary=1 << 20, shuffle=(seed, 0))


def naive_epoch(store: IndexedDataset, seed: int, epoch: int) -> list[list[int]]:
    """Documents in the order of an epoch, by sorting Python's numbers."""
    filled = [d for d in range(store.documents) if store.starts[d] < store.starts[d + 1]]
    keys = {d: int(scrambled(np.array([d]), seed, 0, 2, epoch)[0]) for d in filled}
    return [store.document(d).tolist() for d in sorted(filled, key=lambda d: (keys[d], d))]


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any),
    st.integers(0, 2**63),
    st.integers(0, 40),
    st.data(),
)
def test_any_cut_is_a_part_of_the_naive_stream(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int, first: int, data: st.DataObject
) -> None:
    store = store_of(tmp_path_factory.mktemp("s") / "s", lengths)
    stop = data.draw(st.integers(first + 1, first + 30))
    epochs = stop // store.tokens + 1
    marked = [
        (token, (epoch, place))
        for epoch in range(epochs)
        for place, document in enumerate(naive_epoch(store, seed, epoch))
        for token in document
    ][first:stop]
    stream = stream_of(store, seed=seed)
    found = stream.cut(first, stop)
    assert found.tokens.tolist() == [token for token, _ in marked]
    assert found.lengths.tolist() == list(Counter(place for _, place in marked).values())
    for document, token in zip(np.repeat(found.documents, found.lengths).tolist(), found.tokens, strict=True):
        assert token in store.document(document)
    assert stream.pieces(np.array([first, first]), np.array([stop, first + 1])).tolist() == [len(found.lengths), 1]


def test_epochs_differ_and_hold_the_same_documents(tmp_path: Path) -> None:
    stream = stream_of(store_of(tmp_path / "s", [3] * 50))
    epochs = [stream.cut(150 * e, 150 * (e + 1)).tokens.tolist() for e in range(3)]
    assert all(sorted(e) == list(range(150)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    other = stream_of(stream.store, seed=1).cut(0, 150).tokens.tolist()
    assert other != epochs[0]
    assert stream.cut(0, 150).tokens.tolist() == epochs[0]  # back again


def test_places_beyond_32_bits_are_sound(tmp_path: Path) -> None:
    stream = stream_of(store_of(tmp_path / "s", [2, 3, 2]))
    far = 7 * 10**14
    epoch = stream.cut(far, far + 7)
    assert sorted(epoch.tokens.tolist()) == list(range(7))
    assert sorted(epoch.lengths.tolist()) == [2, 2, 3]
    assert stream.pieces(np.array([far]), np.array([far + 14])).tolist() == [6]


def test_the_order_is_pinned(tmp_path: Path) -> None:
    """A run must go on in the same order after an upgrade of any library, and of this one."""
    assert scrambled(np.arange(3), 1, 2).tolist() == PINNED_BITS
    stream = stream_of(store_of(tmp_path / "s", [1] * 8), seed=5)
    assert stream.cut(0, 16).tokens.tolist() == PINNED_ORDER


@given(st.integers(1, 300), st.integers(0, 2**32), st.one_of(st.floats(0, 0.999), st.integers(1, 400)))
def test_a_split_is_exact_and_disjoint(documents: int, seed: int, held_out: float) -> None:
    numbers = np.arange(documents)
    train, held = split(numbers, held_out, seed=seed, source=0)
    assert sorted([*train.tolist(), *held.tolist()]) == numbers.tolist()
    assert train.tolist() == sorted(train.tolist())
    assert held.tolist() == sorted(held.tolist())
    if held_out >= 1:
        assert len(held) == min(documents, held_out)
    else:
        assert len(held) == (max(1, round(held_out * documents)) if held_out else 0)


def test_splits_of_other_seeds_and_sources_differ() -> None:
    chosen = {tuple(split(np.arange(200), 0.1, seed=s, source=d)[1].tolist()) for s in range(4) for d in range(4)}
    assert len(chosen) == 16


def test_hashes_spread_evenly() -> None:
    bits = np.unpackbits(scrambled(np.arange(20000), 0, 0, 2, 0).view(np.uint8)).reshape(20000, 64)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02


def test_a_token_outside_of_the_vocabulary_is_refused_when_it_is_read(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [4, 4])
    stream = DocumentStream(store, np.arange(2), vocabulary=6, shuffle=None)
    assert stream.cut(0, 6).tokens.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(BadIndexedDataset, match=r"s\.bin, byte 24: token 6 is not in a vocabulary of 6"):
        stream.cut(0, 8)
