"""Writes an indexed dataset atomically: on disk before it is named, the index last; a kill leaves all or nothing."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lockstep.data.corpus.indexed_dataset import DTYPES, HEADER, MAGIC, BadIndexedDataset, IndexedDataset, Note, beside


class IndexedDatasetWriter:
    """Writes documents into an indexed dataset of Megatron's format; see `indexed_dataset` for its files."""

    def __init__(self, path: Path, *, vocabulary: int) -> None:
        """
        Args:
            path: without .bin or .idx.
            vocabulary: tokens take two bytes where all of them fit, else four.
        """
        self.path = path
        self._vocabulary = vocabulary
        self.dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<i4")
        self._lengths: list[NDArray[np.int32]] = []
        self._bin = self._partial(".bin").open("wb")

    def add(self, tokens: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Add documents of these lengths, whose tokens are concatenated.

        Raises:
            BadIndexedDataset: for a document longer than the format can say, or a token outside of the vocabulary.
        """
        if lengths.size and int(lengths.max()) >= 1 << 31:
            raise BadIndexedDataset(f"a document of {lengths.max()} tokens is longer than the format can say: split it")
        assert lengths.sum() == len(tokens)
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocabulary:
            raise BadIndexedDataset(
                f"tokens {tokens.min()} to {tokens.max()} are not in a vocabulary of {self._vocabulary}"
            )
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(lengths.astype("<i4"))

    def append(self, store: IndexedDataset) -> None:
        """Add all documents of another dataset of the same dtype."""
        assert store.dtype == self.dtype
        with store.bin.open("rb") as file:
            while block := file.read(1 << 24):
                self._bin.write(block)
        self._lengths.append(np.diff(store.starts).astype("<i4"))

    @property
    def documents(self) -> int:
        """The number of documents so far."""
        return sum(map(len, self._lengths))

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return sum(int(n.sum(dtype=np.int64)) for n in self._lengths)

    def finish(self, note: Note) -> None:
        """Write the index and the note, sync all files to disk, then rename them to their final names."""
        lengths = np.concatenate([np.zeros(0, "<i4"), *self._lengths])
        ends = np.zeros(len(lengths) + 1, "<i8")
        np.cumsum(lengths, out=ends[1:])
        code = next(c for c, name in DTYPES.items() if np.dtype(name) == self.dtype)
        _close(self._bin)
        with self._partial(".idx").open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(ends)))
            for part in (lengths, ends[:-1] * self.dtype.itemsize, np.arange(len(ends), dtype="<i8")):
                file.write(part.tobytes())
            _close(file)
        with self._partial(".json").open("wb") as file:
            file.write(note.text().encode())
            _close(file)
        for suffix in (".bin", ".json", ".idx"):
            self._partial(suffix).replace(beside(self.path, suffix))
        _sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Close and remove the partial files."""
        self._bin.close()
        self._partial(".bin").unlink(missing_ok=True)

    def _partial(self, suffix: str) -> Path:
        """Two processes that write the same part do not meet in one file."""
        return beside(self.path, f"{suffix}.{os.getpid()}.partial")


def _close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
