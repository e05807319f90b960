"""Tokenizes text files into an indexed dataset with several processes, chunk by chunk; it can be resumed.

Each chunk becomes a small indexed dataset of its own in `<name>.parts`, named by its number, with a digest of all that
decides its content. A killed run goes on from the finished parts; when all are there they are joined, in order, into
the same bytes that one process writes without interruption. A finished dataset is known by a digest of its inputs'
contents, since sizes and times of files may stay as they were when a text is edited.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from glob import escape
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from lockstep.data.child_process import follow_parent
from lockstep.data.corpus.documents import BadText, Chunk, Reading, cut, find_files, read_documents
from lockstep.data.corpus.file_identity import Stamp, content_digests, stamp
from lockstep.data.corpus.indexed_dataset import (
    BadIndexedDataset,
    IndexedDataset,
    Note,
    SourceNote,
    beside,
    prefix,
    read_note,
)
from lockstep.data.corpus.indexed_dataset_writer import IndexedDatasetWriter
from lockstep.data.json_text import Bad
from lockstep.data.tokenizer import BadTokenizer, Tokenizer

OnBad = Literal["stop", "skip"]

CHUNK_BYTES = 1 << 25
EXAMPLES = 20
"""Skipped rows that a note quotes."""
_TOGETHER = 256
"""Documents that the tokenizer gets in one call."""


class BadCorpus(ValueError):
    """An output that cannot be made: its name is taken, its input changes, no document is left, or a worker died."""


@dataclass(frozen=True)
class Tokenization:
    """The settings of a tokenization: everything but the input that decides the tokens."""

    files: tuple[tuple[str, str], ...]
    """Names and texts of the tokenizer's files."""
    begin: tuple[int, ...]
    """Tokens that begin each document: BOS, for tokenizers whose post-processor adds it."""
    end: int
    reading: Reading
    on_bad: OnBad


@dataclass(frozen=True)
class Part:
    """A chunk of the input, and the dataset that its tokens are written to."""

    chunk: Chunk
    path: Path
    made_by: str

    @property
    def done(self) -> bool:
        """Whether it is complete, and made from this input with these settings."""
        try:
            note = IndexedDataset(self.path).note
        except BadIndexedDataset:
            return False
        return note is not None and note.made_by == self.made_by


def tokenization_of(
    tokenizer: Tokenizer, *, end: str | None = None, reading: Reading | None = None, on_bad: OnBad = "stop"
) -> Tokenization:
    """Make the settings of a tokenization.

    Args:
        end: the token that ends each document; the tokenizer's end of text otherwise.

    Raises:
        BadTokenizer: when there is no such token.
    """
    number = tokenizer.eos if end is None else tokenizer.token(end)
    if number is None:
        raise BadTokenizer("the tokenizer does not say which token ends a text: name one with end=TOKEN")
    files = tuple(sorted(tokenizer.files.items()))
    return Tokenization(files, tokenizer.begin, number, reading or Reading(), on_bad)


def tokenize(
    inputs: Sequence[Path],
    output: Path,
    how: Tokenization,
    *,
    workers: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int, int], None] = lambda done, chunks: None,
) -> Note:
    """Tokenize files and folders into the indexed dataset `output`, unless it was made from them already.

    Args:
        output: the dataset's path without .bin or .idx.
        progress: called with the number of finished chunks and of all chunks.

    Raises:
        BadText: for input that cannot be read, or, unless they are to be skipped, for the first bad row.
        BadCorpus: when something else has this name, when an input changes meanwhile, when no document is left, or
            when a worker process dies.
    """
    output = prefix(output)
    files, _ = find_files(inputs)
    folder = output.with_name(f"{output.name}.parts")
    if _made(output, files, how, chunk_bytes, folder):
        shutil.rmtree(folder, ignore_errors=True)
        return _note(output)
    stamps = [stamp(path) for path in files]
    parts = _parts(files, stamps, folder, how, chunk_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        for stale in (*folder.glob("*.partial"), *output.parent.glob(f"{escape(output.name)}.*.partial")):
            stale.unlink()
        todo = [p for p in parts if not p.done]
        progress(len(parts) - len(todo), len(parts))
        for number, _ in enumerate(_run(todo, how, workers), start=len(parts) - len(todo) + 1):
            progress(number, len(parts))
        made_by = _made_by(files, how, chunk_bytes)
        _check_unchanged(files, stamps)
        _join(parts, files, output, how, made_by)
        shutil.rmtree(folder)
    return _note(output)


def texts(inputs: Sequence[Path], reading: Reading, on_bad: OnBad, skipped: list[str]) -> Iterator[str]:
    """Read all documents of files and folders, in order; messages on skipped rows are appended to `skipped`.

    Raises:
        BadText: as `tokenize`.
    """
    for path in find_files(inputs)[0]:
        for chunk in cut(path, reading, CHUNK_BYTES):
            for document in read_documents(chunk, reading):
                if isinstance(document, Bad):
                    skipped.append(_stop_or_skip(document, on_bad))
                else:
                    yield document


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs (flock); a killed run releases it."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadCorpus(f"another run is at work in {folder}: wait for it or end it") from error
        yield


def _stop_or_skip(bad: Bad, on_bad: OnBad) -> str:
    if on_bad == "stop":
        raise BadText(f"{bad.reason}: correct it, or have bad rows counted and skipped (on-bad skip)")
    return bad.reason


def _digest(*what: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(what, default=repr).encode())


def _made_by(files: Sequence[Path], how: Tokenization, chunk_bytes: int) -> str:
    """Digest of all that decides the store's bytes: names and contents of the inputs, and the settings."""
    return _digest([str(path) for path in files], content_digests(files), how, chunk_bytes)


def _check_unchanged(files: Sequence[Path], stamps: Sequence[Stamp]) -> None:
    """Refuse to join parts of inputs that were changed while they were read."""
    for path, before in zip(files, stamps, strict=True):
        if stamp(path) != before:
            raise BadCorpus(f"{path} was changed while it was tokenized: run the same command again")


def _made(output: Path, files: Sequence[Path], how: Tokenization, chunk_bytes: int, folder: Path) -> bool:
    """Whether the store is there; refuses to overwrite what is not its own."""
    there = [p for suffix in (".idx", ".bin", ".json") if (p := beside(output, suffix)).exists()]
    if beside(output, ".idx") in there:
        note = IndexedDataset(output).note
        if note is None or note.made_by != _made_by(files, how, chunk_bytes):
            raise BadCorpus(
                f"{there[0]} exists and was made from other input or with other settings: remove the store or "
                "choose another name"
            )
        return True
    if there and not folder.is_dir():
        raise BadCorpus(f"{there[0]} exists and belongs to no store: remove it or choose another name")
    return False


def _note(output: Path) -> Note:
    note = read_note(beside(output, ".json"))
    assert note
    return note


def _parts(
    files: Sequence[Path], stamps: Sequence[Stamp], folder: Path, how: Tokenization, chunk_bytes: int
) -> list[Part]:
    settings, parts = _digest(how), list[Part]()
    for path, before in zip(files, stamps, strict=True):
        for chunk in cut(path, how.reading, chunk_bytes):
            made_by = _digest(settings, str(path), before, chunk.start, chunk.stop)
            parts.append(Part(chunk, folder / f"{len(parts):06d}", made_by))
    return parts


def _run(parts: Sequence[Part], how: Tokenization, workers: int) -> Iterator[None]:
    """Make parts, in order, so that the error that is raised is that of the first bad row."""
    make = partial(_make, how)
    if workers == 1 or len(parts) < 2:
        yield from map(make, parts)
        return
    pool = ProcessPoolExecutor(min(workers, len(parts)), get_context("spawn"), _start_worker)
    try:
        yield from pool.map(make, parts)
    except BrokenProcessPool as error:
        raise BadCorpus(
            "a worker process died, perhaps for want of memory: run the same command again to go on, "
            "with fewer workers if it dies again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """A worker leaves parallelism to the processes, interruption to its parent, and ends when its parent is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    follow_parent()


@lru_cache(1)
def _tokenizer(how: Tokenization) -> Tokenizer:
    """Built once in a process."""
    return Tokenizer(dict(how.files))


def _make(how: Tokenization, part: Part) -> None:
    """Tokenize one chunk."""
    tokenizer = _tokenizer(how)
    writer = IndexedDatasetWriter(part.path, vocabulary=tokenizer.numbers)
    bad: list[str] = []
    try:
        for group in _batched(_good(read_documents(part.chunk, how.reading), how.on_bad, bad), _TOGETHER):
            encoded = [[*how.begin, *ids, how.end] for ids in tokenizer.encode_all(group)]
            writer.add(np.concatenate(encoded), np.array([len(ids) for ids in encoded]))
    except BaseException:
        writer.abandon()
        raise
    source = SourceNote(str(part.chunk.path), 0, writer.documents + len(bad), len(bad))
    writer.finish(_described(writer, how, part.made_by, (source,), bad))


def _described(
    writer: IndexedDatasetWriter, how: Tokenization, made_by: str, sources: tuple[SourceNote, ...], bad: Sequence[str]
) -> Note:
    return Note(
        tokenizer=_tokenizer(how).digest,
        vocabulary=_tokenizer(how).numbers,
        end=how.end,
        made_by=made_by,
        documents=writer.documents,
        tokens=writer.tokens,
        sources=sources,
        examples=tuple(bad[:EXAMPLES]),
    )


def _good(found: Iterable[str | Bad], on_bad: OnBad, bad: list[str]) -> Iterator[str]:
    for document in found:
        if isinstance(document, Bad):
            bad.append(_stop_or_skip(document, on_bad))
        else:
            yield document


def _batched(items: Iterator[str], size: int) -> Iterator[list[str]]:
    while group := list(islice(items, size)):
        yield group


def _join(parts: Sequence[Part], files: Sequence[Path], output: Path, how: Tokenization, made_by: str) -> None:
    """All parts as one store."""
    writer = IndexedDatasetWriter(output, vocabulary=_tokenizer(how).numbers)
    rows, skipped = dict.fromkeys(map(str, files), 0), dict.fromkeys(map(str, files), 0)
    examples: list[str] = []
    try:
        for part in parts:
            store = IndexedDataset(part.path)
            assert store.note
            writer.append(store)
            for source in store.note.sources:
                rows[source.path] += source.rows
                skipped[source.path] += source.skipped
            examples += store.note.examples[: EXAMPLES - len(examples)]
        if not writer.documents:
            raise BadCorpus(
                f"no document is left of {len(files)} files and {sum(rows.values())} rows, {sum(skipped.values())} of "
                "them bad: give files with text"
            )
    except BaseException:
        writer.abandon()
        raise
    sources = tuple(SourceNote(str(p), p.stat().st_size, rows[str(p)], skipped[str(p)]) for p in files)
    writer.finish(_described(writer, how, made_by, sources, examples))
