"""An endless stream of shuffled documents, concatenated epoch after epoch, that samples are cut from; held-out split.

Nothing is lost between two epochs: a sample may end in the next one. Orders and the held-out split come from a hash of
(seed, source, epoch, document), so they are functions of these numbers alone, whatever the version of any library.
Where a place of the stream lies is found by binary search in cumulative lengths; no document is visited in a loop.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lockstep.data.batch import Ints
from lockstep.data.corpus.indexed_dataset import BadIndexedDataset, IndexedDataset, out_of_vocabulary_message

_HELD_OUT, _ORDER = 1, 2


def scrambled(documents: Ints, *key: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each document number, [D], keyed: the finaliser of SplitMix64 (Steele et al. 2014), chained.

    Chaining adds each number of the key to the hash so far; with the same key, different documents never collide.
    """
    state = _mixed(np.array([0x9E3779B97F4A7C15], np.uint64))
    for part in key:
        state = _mixed(state + np.array([part % (1 << 64)], np.uint64))
    return _mixed(state + documents.astype(np.uint64))


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def split(documents: Ints, held_out: float, *, seed: int, source: int) -> tuple[Ints, Ints]:
    """Split documents into training and held-out ones, both in stored order.

    Args:
        held_out: a share below 1, of which at least one document is held out, or a number of documents; 0 for none.
    """
    wanted = round(held_out) if held_out >= 1 else max(1, round(held_out * len(documents))) if held_out else 0
    order = np.argsort(scrambled(documents, seed, source, _HELD_OUT), kind="stable")
    chosen = np.zeros(len(documents), bool)
    chosen[order[:wanted]] = True
    return documents[~chosen], documents[chosen]


@dataclass(frozen=True)
class Cut:
    """Consecutive tokens of a stream, the documents that they come from, and the number of tokens from each."""

    tokens: Ints
    lengths: Ints
    documents: Ints


class DocumentStream:
    """Documents of an indexed dataset, repeated endlessly: in stored order, or reshuffled in every epoch."""

    def __init__(
        self, store: IndexedDataset, documents: Ints, *, vocabulary: int, shuffle: tuple[int, int] | None
    ) -> None:
        """
        Args:
            documents: their numbers; empty documents are skipped.
            shuffle: the run's seed and the number of the source, or None.
        """
        self.store = store
        self._vocabulary = vocabulary
        self._shuffle = shuffle
        lengths = store.starts[documents + 1] - store.starts[documents]
        self._documents, self._lengths = documents[lengths > 0], lengths[lengths > 0]
        self.tokens = int(self._lengths.sum())
        """Tokens of one epoch."""
        self._epochs: dict[int, tuple[Ints, Ints]] = {}

    @property
    def documents(self) -> int:
        """Documents of one epoch that are not empty."""
        return len(self._documents)

    def pieces(self, first: Ints, stop: Ints) -> Ints:
        """The number of documents that tokens first … stop of the stream come from; all are [N], and first < stop."""
        return self._document_at(stop - 1) - self._document_at(first) + 1

    def cut(self, first: int, stop: int) -> Cut:
        """The tokens first … stop of the stream.

        Raises:
            BadIndexedDataset: for a token outside of the vocabulary.
        """
        begin, end = (int(n) for n in self._document_at(np.array([first, stop - 1])))
        inside = np.arange(begin, end + 1)
        epochs, numbers = inside // self.documents, inside % self.documents
        starts, ends = np.empty(len(inside), np.int64), np.empty(len(inside), np.int64)
        documents = np.empty(len(inside), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order, limits = self._epoch(epoch)
            chosen = order[numbers[here]]
            ends[here] = epoch * self.tokens + limits[numbers[here]]
            starts[here] = ends[here] - self._lengths[chosen]
            documents[here] = self._documents[chosen]
        sources = self.store.starts[documents] + np.maximum(first - starts, 0)
        lengths = np.minimum(ends, stop) - np.maximum(starts, first)
        ranges = np.repeat(sources - (np.cumsum(lengths) - lengths), lengths) + np.arange(stop - first)
        tokens = self.store.take(ranges)
        strange = np.flatnonzero((tokens < 0) | (tokens >= self._vocabulary))
        if strange.size:
            place = int(strange[0])
            raise BadIndexedDataset(
                out_of_vocabulary_message(self.store, int(ranges[place]), int(tokens[place]), self._vocabulary)
            )
        return Cut(tokens, lengths, documents)

    def _document_at(self, places: Ints) -> Ints:
        """The document in which each place of the stream lies, counted through all epochs, [N]."""
        epochs, rest = places // self.tokens, places % self.tokens
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            found[here] = epoch * self.documents + np.searchsorted(self._epoch(epoch)[1], rest[here], side="right")
        return found

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """The order of an epoch and where its documents end; the two that were used last are kept."""
        found = self._epochs.get(epoch)
        if found is None:
            order = np.arange(self.documents)
            if self._shuffle:
                order = np.argsort(scrambled(self._documents, *self._shuffle, _ORDER, epoch), kind="stable")
            found = order, np.cumsum(self._lengths[order])
            # a new dictionary, because a thread that makes the next samples may look at the old one
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: found}
        return found
