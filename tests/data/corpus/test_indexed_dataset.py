"""Our stores and Megatron's are the same files; whatever is wrong with one is said with its byte."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from lockstep.data.corpus.indexed_dataset import BLOCK, BadIndexedDataset, IndexedDataset, Note, SourceNote
from lockstep.data.corpus.indexed_dataset_writer import IndexedDatasetWriter

Documents = Sequence[Sequence[int]]
NOTE = Note("d1", 300, 0, "m1")


def write(path: Path, documents: Documents, *, vocabulary: int = 300, note: Note = NOTE) -> IndexedDataset:
    writer = IndexedDatasetWriter(path, vocabulary=vocabulary)
    for tokens in documents:
        writer.add(np.array(tokens, np.int64), np.array([len(tokens)]))
    counted = Note(note.tokenizer, note.vocabulary, note.end, note.made_by, writer.documents, writer.tokens)
    writer.finish(counted)
    return IndexedDataset(path)


def by_megatron(path: Path, documents: Sequence[Documents], dtype: type = np.int32) -> None:
    """Each document is a list of sequences."""
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
    for sequences in documents:
        flat = [t for s in sequences for t in s]
        builder.add_document(torch.tensor(flat, dtype=torch.int64), [len(s) for s in sequences])
    builder.finalize(f"{path}.idx")


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(0, 299), max_size=9), min_size=1, max_size=9), st.sampled_from([300, 70000]))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocabulary: int
) -> None:
    store = write(tmp_path_factory.mktemp("s") / "a.b", documents, vocabulary=vocabulary)
    assert [store.document(i).tolist() for i in range(store.documents)] == documents
    assert store.tokens == sum(map(len, documents))
    assert store.dtype.itemsize == (2 if vocabulary == 300 else 4)
    assert store.complete.all()


@pytest.mark.parametrize("vocabulary", [300, 70000])
def test_megatron_reads_ours(tmp_path: Path, vocabulary: int) -> None:
    documents = [[1, 2, 3], [4], [], [5, 299]]
    write(tmp_path / "ours", documents, vocabulary=vocabulary)
    theirs = MegatronDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_we_read_megatrons(tmp_path: Path, dtype: type) -> None:
    by_megatron(tmp_path / "theirs", [[[1, 2], [3]], [[4]], [[], [5, 6]]], dtype)
    for name in ("theirs", "theirs.bin", "theirs.idx"):
        store = IndexedDataset(tmp_path / name)
        assert [store.document(i).tolist() for i in range(store.documents)] == [[1, 2, 3], [4], [5, 6]]
        assert store.note is None
        assert store.take(np.array([0, 5, 3])).tolist() == [1, 6, 4]


def test_a_note_tells_how_the_store_was_made(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "s", vocabulary=300)
    writer.add(np.array([7, 8]), np.array([2]))
    note = Note("d", 300, 8, "m", 1, 2, (SourceNote("a.txt", 5, 3, 2), SourceNote("b", 1, 1, 0)), ("a.txt:1: bad",))
    writer.finish(note)
    read = IndexedDataset(tmp_path / "s").note
    assert read == note
    assert (note.rows, note.skipped) == (4, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.bin", "s.idx", "s.json"]


def test_an_abandoned_store_leaves_nothing(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "s", vocabulary=300)
    writer.add(np.array([7, 8]), np.array([2]))
    writer.abandon()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", [-1, 300, 1 << 16])
def test_a_token_outside_of_the_vocabulary_is_not_written(tmp_path: Path, token: int) -> None:
    with pytest.raises(
        BadIndexedDataset, match=f"^tokens {min(token, 5)} to {max(token, 5)} are not in a vocabulary of 300$"
    ):
        IndexedDatasetWriter(tmp_path / "s", vocabulary=300).add(np.array([5, token]), np.array([2]))


def refusal(path: Path) -> str:
    with pytest.raises(BadIndexedDataset) as caught:
        IndexedDataset(path)
    return str(caught.value)


def test_every_truncation_is_said_with_its_byte(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    whole = store.idx.read_bytes()
    needed = 34 + 2 * 12 + 3 * 8
    assert len(whole) == needed
    for length in range(needed):
        store.idx.write_bytes(whole[:length])
        inside = "inside of its header" if length < 34 else f"and its header asks for {needed}"
        assert refusal(store.path) == f"{store.idx} is truncated at byte {length}, {inside}: copy or make it again"
    store.idx.write_bytes(whole)
    for length in range(10):
        store.bin.write_bytes(bytes(length))
        assert refusal(store.path) == (
            f"{store.bin} is truncated at byte {length}, and its index needs 10 bytes: copy or make it again"
        )
        assert IndexedDataset(store.path, salvage=True).complete.tolist() == [length >= 6, False]


def test_damage_is_said_with_its_byte(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    whole, idx, bin_ = store.idx.read_bytes(), store.idx, store.bin

    def damaged(at: int, value: bytes) -> str:
        idx.write_bytes(whole[:at] + value + whole[at + len(value) :])
        return refusal(store.path)

    assert damaged(0, b"X") == (
        f"{idx} does not begin as the index of an indexed dataset: give a store made by Megatron or Lockstep"
    )
    assert damaged(9, b"\2") == f"{idx}, byte 9: the format's version is 2, and only 1 can be read"
    assert damaged(17, b"\6") == f"{idx}, byte 17: type 6 does not hold tokens; 1, 2, 3, 4, 5, 8 do"
    assert damaged(38, struct.pack("<i", -2)) == f"{idx}, byte 38: a sequence of -2 tokens"
    assert damaged(50, struct.pack("<q", 8)) == (
        f"{idx}, byte 50: sequence 1 is said to begin at byte 8 of the .bin file, and the ones before it end at 6"
    )
    bounds = f"{idx}, byte 58: the bounds of its documents do not rise from 0 to 2"
    assert damaged(58, struct.pack("<q", 1)).startswith(bounds)
    assert damaged(66, struct.pack("<q", 3)).startswith(bounds)
    assert damaged(74, struct.pack("<q", 1)).startswith(bounds)
    assert damaged(len(whole), b"\0\0") == (
        f"{idx} goes on after byte 82, where its lists end: multimodal stores cannot be read"
    )
    idx.write_bytes(whole)
    bin_.write_bytes(bytes(11))
    assert refusal(store.path) == (
        f"{bin_} goes on after byte 10, where its index ends: the two belong to different stores"
    )


def test_missing_and_foreign_files_are_said(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.bin") == (
        f"there is no file {tmp_path}/none.idx: an indexed dataset is a pair of .bin and .idx files"
    )
    store = write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    note = tmp_path / "s.json"
    text = note.read_text()
    note.write_text(text.replace('"tokens": 5', '"tokens": 6'))
    assert refusal(store.path) == (
        f"{note} tells of 2 documents and 6 tokens, and {store.idx} of 2 and 5: they belong to different stores"
    )
    for broken in ("{", "[]", "{}", text.replace('"end"', '"ende"'), text.replace('"format": 1', '"format": 2')):
        note.write_text(broken)
        assert refusal(store.path).startswith(f"{note} is not a note of how an indexed dataset was made (")
    note.unlink()
    assert IndexedDataset(store.path).note is None


def test_tokens_outside_of_the_vocabulary_are_found(tmp_path: Path) -> None:
    by_megatron(tmp_path / "s", [[[1, 2]], [], [[3, 50, 51]], [[4]], [[-1]], [[60]]], np.int64)
    store = IndexedDataset(tmp_path / "s")
    assert store.out_of_vocabulary(50).tolist() == [2, 4, 5]
    assert store.out_of_vocabulary(61).tolist() == [4]
    assert store.describe_out_of_vocabulary(50, 2) == (
        f"{store.bin}, byte 24: token 50 is not in a vocabulary of 50: the store was made with another tokenizer"
    )


def test_strangers_in_a_later_block_are_found(tmp_path: Path) -> None:
    tokens = np.zeros(2 * BLOCK + 5, np.int64)
    tokens[[BLOCK - 1, BLOCK, -1]] = 299
    writer = IndexedDatasetWriter(tmp_path / "s", vocabulary=300)
    writer.add(tokens, np.array([BLOCK, BLOCK, 0, 5]))
    writer.finish(Note("d1", 300, 0, "m1", writer.documents, writer.tokens))
    assert IndexedDataset(tmp_path / "s").out_of_vocabulary(299).tolist() == [0, 1, 3]
