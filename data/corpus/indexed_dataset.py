"""Megatron's indexed datasets (.bin and .idx), memory-mapped, with an optional .json note on how they were made.

`<name>.bin` holds the tokens of all documents head to tail. `<name>.idx` holds a header of 34 bytes (the magic
`MMIDIDX`, two zero bytes, the version 1 as uint64, a code for the type of the tokens as one byte, the number S of
sequences and the number E of document bounds as uint64), then S lengths in tokens (int32), S offsets in bytes (int64),
and E bounds (int64): sequences bounds[i] … bounds[i+1] make up document i. All numbers are little-endian. The format is
defined by `megatron/core/datasets/indexed_dataset.py`. `<name>.json` is ours and optional.
"""

import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.data.batch import Ints

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of the types that hold tokens; 6 and 7 are floating point."""

BLOCK = 1 << 20
"""Tokens that are checked in one go, and the least distance between two checks."""
LOOKS = 1024


class BadIndexedDataset(ValueError):
    """An indexed dataset that cannot be used; the message names the file and the byte."""


@dataclass(frozen=True)
class SourceNote:
    """What was read from one input file."""

    path: str
    bytes: int
    rows: int
    skipped: int


@dataclass(frozen=True)
class Note:
    """How an indexed dataset was made: the .json file beside it."""

    tokenizer: str
    """Digest of the tokenizer's vocabulary; empty where no tokenizer made it."""
    vocabulary: int
    """One more than the highest token id."""
    end: int
    """The token that ends each document."""
    made_by: str
    """Digest of all that decides the dataset's bytes, such as the inputs' contents."""
    documents: int = 0
    tokens: int = 0
    sources: tuple[SourceNote, ...] = ()
    examples: tuple[str, ...] = ()
    """Some of the skipped rows, a sentence each."""

    @property
    def rows(self) -> int:
        """The number of rows that were read, skipped ones included."""
        return sum(s.rows for s in self.sources)

    @property
    def skipped(self) -> int:
        """The number of bad rows that were skipped."""
        return sum(s.skipped for s in self.sources)

    def text(self) -> str:
        """The note as JSON."""
        return json.dumps({"format": 1, **asdict(self)}, indent=1) + "\n"


def read_note(path: Path) -> Note | None:
    """Read the note at a path, if there is one.

    Raises:
        BadIndexedDataset: when it is broken.
    """
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != 1:
            raise ValueError("its format is not 1")
        values["sources"] = tuple(SourceNote(**s) for s in values["sources"])
        values["examples"] = tuple(values["examples"])
        return Note(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadIndexedDataset(
            f"{path} is not a note of how an indexed dataset was made ({error}): remove it to read the store as it is"
        ) from error


def prefix(path: Path) -> Path:
    """A dataset's path without .bin or .idx."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def beside(path: Path, suffix: str) -> Path:
    """The file of a dataset with this suffix; dots in the name are kept."""
    return path.with_name(path.name + suffix)


class IndexedDataset:
    """An indexed dataset for reading: the index is read at once, tokens come from the memory-mapped file on demand."""

    def __init__(self, path: Path, *, salvage: bool = False) -> None:
        """
        Args:
            path: with or without .bin or .idx.
            salvage: accept a .bin file that ends early; `complete` says which documents are there.

        Raises:
            BadIndexedDataset: when a file is missing, truncated or damaged.
        """
        self.path = prefix(path)
        self.bin, self.idx = beside(self.path, ".bin"), beside(self.path, ".idx")
        for file in (self.idx, self.bin):
            if not file.is_file():
                raise BadIndexedDataset(f"there is no file {file}: an indexed dataset is a pair of .bin and .idx files")
        code, sequences, bounds = _header(self.idx)
        self.dtype = np.dtype(DTYPES[code])
        self.starts = _starts(self.idx, self.dtype.itemsize, sequences, bounds)
        """[documents + 1] where each document begins, in tokens, and where the last one ends."""
        self._tokens = self._mapped(salvage)
        self.note = read_note(beside(self.path, ".json"))
        if self.note and (self.note.documents, self.note.tokens) != (self.documents, self.tokens):
            raise BadIndexedDataset(
                f"{beside(self.path, '.json')} tells of {self.note.documents} documents and {self.note.tokens} tokens, "
                f"and {self.idx} of {self.documents} and {self.tokens}: they belong to different stores"
            )

    @property
    def documents(self) -> int:
        """The number of documents, empty ones included."""
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """The number of tokens of all documents."""
        return int(self.starts[-1])

    @property
    def complete(self) -> NDArray[np.bool_]:
        """[documents] whether the .bin file holds the whole document."""
        whole: NDArray[np.bool_] = self.starts[1:] <= len(self._tokens)
        return whole

    def document(self, number: int) -> Ints:
        """The tokens of one document."""
        return self._tokens[self.starts[number] : self.starts[number + 1]].astype(np.int64)

    def take(self, places: Ints) -> Ints:
        """The tokens at these indices of the dataset, both [N]."""
        return self._tokens[places].astype(np.int64)

    def out_of_vocabulary(self, vocabulary: int, *, all_of_it: bool = False) -> Ints:
        """The documents with tokens outside of a vocabulary, in order.

        Of a dataset of more than LOOKS × BLOCK tokens only LOOKS evenly spaced blocks are checked, unless `all_of_it`;
        reading a sample checks its tokens again.
        """
        step = BLOCK if all_of_it else max(BLOCK, -(-len(self._tokens) // LOOKS))
        found = [self._outside(start, vocabulary) for start in range(0, len(self._tokens), step)]
        places = np.concatenate([np.zeros(0, np.int64), *found])
        return np.unique(np.searchsorted(self.starts, places, side="right") - 1).astype(np.int64)

    def describe_out_of_vocabulary(self, vocabulary: int, document: int) -> str:
        """The error message for a document with a token outside of the vocabulary."""
        start = int(self.starts[document])
        tokens = self.document(document)
        place = int(np.flatnonzero((tokens < 0) | (tokens >= vocabulary))[0])
        return out_of_vocabulary_message(self, start + place, int(tokens[place]), vocabulary)

    def _outside(self, start: int, vocabulary: int) -> Ints:
        block = self._tokens[start : start + BLOCK]
        if not block.size or (int(block.max()) < vocabulary and int(block.min()) >= 0):
            return np.zeros(0, np.int64)
        wide = block.astype(np.int64)
        return np.flatnonzero((wide < 0) | (wide >= vocabulary)) + start

    def _mapped(self, salvage: bool) -> NDArray[Any]:
        there, needed = self.bin.stat().st_size, self.tokens * self.dtype.itemsize
        if there < needed and not salvage:
            raise BadIndexedDataset(
                f"{self.bin} is truncated at byte {there}, and its index needs {needed} bytes: copy or make it again"
            )
        if there > needed:
            raise BadIndexedDataset(
                f"{self.bin} goes on after byte {needed}, where its index ends: the two belong to different stores"
            )
        count = there // self.dtype.itemsize
        return np.asarray(np.memmap(self.bin, self.dtype, "r", shape=(count,))) if count else np.zeros(0, self.dtype)


def out_of_vocabulary_message(store: IndexedDataset, place: int, token: int, vocabulary: int) -> str:
    """The error message for a token outside of the vocabulary."""
    return (
        f"{store.bin}, byte {place * store.dtype.itemsize}: token {token} is not in a vocabulary of {vocabulary}: "
        "the store was made with another tokenizer"
    )


def _header(idx: Path) -> tuple[int, int, int]:
    """Code of the type, sequences and document bounds, after checking them against the file's length."""
    there = idx.stat().st_size
    with idx.open("rb") as file:
        head = file.read(HEADER.size)
    if head[: len(MAGIC)] != MAGIC[: len(head)]:
        raise BadIndexedDataset(
            f"{idx} does not begin as the index of an indexed dataset: give a store made by Megatron or Lockstep"
        )
    if len(head) < HEADER.size:
        raise BadIndexedDataset(f"{idx} is truncated at byte {there}, inside of its header: copy or make it again")
    _, version, code, sequences, bounds = HEADER.unpack(head)
    if version != 1:
        raise BadIndexedDataset(f"{idx}, byte 9: the format's version is {version}, and only 1 can be read")
    if code not in DTYPES:
        raise BadIndexedDataset(f"{idx}, byte 17: type {code} does not hold tokens; {', '.join(map(str, DTYPES))} do")
    needed = HEADER.size + 12 * sequences + 8 * bounds
    if there < needed:
        raise BadIndexedDataset(
            f"{idx} is truncated at byte {there}, and its header asks for {needed}: copy or make it again"
        )
    if there > needed:
        raise BadIndexedDataset(
            f"{idx} goes on after byte {needed}, where its lists end: multimodal stores cannot be read"
        )
    return code, sequences, bounds


def _starts(idx: Path, itemsize: int, sequences: int, bounds: int) -> Ints:
    """[documents + 1] first tokens of the documents, after checking that sequences stand head to tail."""
    at = HEADER.size
    lengths = _list(idx, "<i4", at, sequences)
    pointers = _list(idx, "<i8", at + 4 * sequences, sequences)
    limits = _list(idx, "<i8", at + 12 * sequences, bounds)
    if sequences and lengths[least := int(lengths.argmin())] < 0:
        raise BadIndexedDataset(f"{idx}, byte {at + 4 * least}: a sequence of {lengths[least]} tokens")
    ends = np.zeros(sequences + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    wrong = np.flatnonzero(pointers != ends[:-1] * itemsize)
    if wrong.size:
        first = int(wrong[0])
        raise BadIndexedDataset(
            f"{idx}, byte {at + 4 * sequences + 8 * first}: sequence {first} is said to begin at byte "
            f"{pointers[first]} of the .bin file, and the ones before it end at {ends[first] * itemsize}"
        )
    sound = bounds >= 1 and limits[0] == 0 and limits[-1] == sequences and bool((np.diff(limits) >= 0).all())
    if not sound:
        raise BadIndexedDataset(
            f"{idx}, byte {at + 12 * sequences}: the bounds of its documents do not rise from 0 to {sequences}, "
            "the number of its sequences: end each document when the store is made"
        )
    return ends[limits]


def _list(idx: Path, dtype: str, offset: int, count: int) -> NDArray[Any]:
    return np.memmap(idx, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)
