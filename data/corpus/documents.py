"""Reads documents from text, JSON lines and Parquet files, chunk by chunk.

A file is cut into chunks that can be read independently, so that reading is parallel and can be resumed. A bad row is a
value and not an exception: the caller decides whether to stop or to count it and go on.
"""

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lockstep.data.json_text import Bad, encodable, parsed_json

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_NEWLINES = 1 << 24


class BadText(ValueError):
    """Input that cannot be read; the message names the file and the line, row or byte."""


@dataclass(frozen=True)
class Reading:
    """How documents are found in files."""

    field: str = "text"
    """The field of JSON lines, or the column of Parquet files, that holds the text."""
    separator: str | None = None
    """A line that stands between the documents of a .txt file; without one the whole file is a document."""


@dataclass(frozen=True)
class Chunk:
    """The rows of a file that begin at start … stop: in bytes, or in row groups of a Parquet file."""

    path: Path
    start: int
    stop: int


def find_files(inputs: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files to read, with folders expanded in alphabetical order; and the other files in those folders.

    Raises:
        BadText: for an input that does not exist, cannot be read, is empty, or is given twice.
    """
    found: list[Path] = []
    others: list[Path] = []
    for each in inputs:
        if each.is_dir():
            inside = [p for p in sorted(each.rglob("*")) if p.is_file()]
            readable = [p for p in inside if p.name.endswith(SUFFIXES)]
            if not readable:
                raise BadText(f"{each} holds no {', '.join(SUFFIXES)} files")
            found += readable
            others += [p for p in inside if p not in set(readable)]
        elif not each.is_file():
            raise BadText(f"there is no file {each}")
        elif not each.name.endswith(SUFFIXES):
            raise BadText(f"{each} cannot be read: give {', '.join(SUFFIXES)} files or folders of them")
        else:
            found.append(each)
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            raise BadText(f"{path} is given twice")
        seen.add(path.resolve())
    return found, others


def cut(path: Path, reading: Reading, size: int) -> list[Chunk]:
    """Cut a file into chunks of about `size` bytes; a .txt file without separator and a .gz file are one chunk.

    Raises:
        BadText: when a Parquet file is damaged or does not have the column.
    """
    if path.suffix == ".parquet":
        return _row_groups(path, reading.field, size)
    length = path.stat().st_size
    if path.suffix == ".gz" or (path.suffix == ".txt" and reading.separator is None):
        return [Chunk(path, 0, length)]
    return [Chunk(path, start, min(start + size, length)) for start in range(0, length, size)]


def read_documents(chunk: Chunk, reading: Reading) -> Iterator[str | Bad]:
    """Read the texts and bad rows of a chunk, in order.

    Raises:
        BadText: when the file itself is damaged.
    """
    if chunk.path.suffix == ".parquet":
        yield from _from_parquet(chunk, reading.field)
    elif chunk.path.suffix != ".txt":
        yield from _from_json(chunk, reading.field)
    elif reading.separator is None:
        yield _decoded(chunk.path.read_bytes(), chunk.path, 0)
    else:
        yield from _separated(chunk, reading.separator)


def _from_json(chunk: Chunk, name: str) -> Iterator[str | Bad]:
    with _opened(chunk.path) as file:
        first, before = _first_line(file, chunk.start), None
        for number, (offset, line) in enumerate(_lines(file, first, chunk, gz=chunk.path.suffix == ".gz")):
            if not line.strip():
                continue
            text = _field(line, chunk.path, offset, name)
            if isinstance(text, Bad):
                before = _newlines(chunk.path, first) if before is None else before
                text = Bad(f"{chunk.path}:{before + number + 1}: {text.reason}")
            yield text


def _field(line: bytes, path: Path, offset: int, name: str) -> str | Bad:
    """The text of a JSON line; the reason of a bad one does not yet say where it is."""
    text = _decoded(line.removesuffix(b"\n"), path, offset)
    if isinstance(text, Bad):
        return Bad(text.reason.removeprefix(f"{path}, "))
    row = parsed_json(text)
    if isinstance(row, Bad):
        return row
    if not isinstance(row, dict):
        return Bad(f"a JSON object with the field {name!r} is needed, and this is {type(row).__name__}")
    found = row.get(name)
    if isinstance(found, str):
        return found if encodable(found) else Bad(f"the field {name!r} holds half of a surrogate pair")
    if found is not None:
        return Bad(f"the field {name!r} is no text but {type(found).__name__}")
    return Bad(f"no text in the field {name!r}; the row has {', '.join(map(repr, row)) or 'no fields'}")


def _decoded(raw: bytes, path: Path, offset: int) -> str | Bad:
    try:
        return raw.decode("utf-8" if offset else "utf-8-sig")  # a byte order mark is no part of a text
    except UnicodeDecodeError as error:
        return Bad(f"{path}, byte {offset + error.start}: not valid UTF-8 ({error.reason})")


def _separated(chunk: Chunk, separator: str) -> Iterator[str | Bad]:
    """Runs of lines between separating lines; one belongs to the chunk in which the line before it begins."""
    wanted, lines, begin = separator.encode(), list[bytes](), 0
    inside = chunk.start == 0
    with chunk.path.open("rb") as file:
        offset = _first_line(file, chunk.start)
        for line in file:
            if line.rstrip(b"\r\n") == wanted:
                if lines:
                    yield _decoded(b"".join(lines), chunk.path, begin)
                    lines = []
                inside = offset < chunk.stop
            elif inside:
                begin = begin if lines else offset
                lines.append(line)
            offset += len(line)
            if offset >= chunk.stop and not inside:
                return
    if lines:
        yield _decoded(b"".join(lines), chunk.path, begin)


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _first_line(file: BinaryIO, start: int) -> int:
    """Go to the first line that begins at this byte or later; returns where that is."""
    if start:
        file.seek(start - 1)
        return start - 1 + len(file.readline())
    return 0


def _lines(file: BinaryIO, offset: int, chunk: Chunk, *, gz: bool) -> Iterator[tuple[int, bytes]]:
    """(byte, line) for each line that begins in the chunk."""
    while gz or offset < chunk.stop:
        try:
            line = file.readline()
        except (EOFError, OSError, zlib.error) as error:
            raise BadText(f"{chunk.path} cannot be read on after byte {offset} of its text: {error}") from error
        if not line:
            return
        yield offset, line
        offset += len(line)


def _newlines(path: Path, stop: int) -> int:
    """Lines that end before a byte of the file."""
    found = 0
    with path.open("rb") as file:
        while stop > 0 and (block := file.read(min(stop, _NEWLINES))):
            found += block.count(b"\n")
            stop -= len(block)
    return found


def _row_groups(path: Path, name: str, size: int) -> list[Chunk]:
    """Neighbouring row groups of about `size` bytes together."""
    with _parquet(path) as file:
        kind = _column_type(path, file.schema_arrow, name)
        if not (_is_text(kind) or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))):
            raise BadText(f"{path}: column {name!r} is no text but {kind}")
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
    chunks, start, filled = [], 0, 0
    for i, length in enumerate(sizes):
        filled += length
        if filled >= size or i == len(sizes) - 1:
            chunks.append(Chunk(path, start, i + 1))
            start, filled = i + 1, 0
    return chunks


def _column_type(path: Path, schema: pa.Schema, name: str) -> pa.DataType:
    if name not in schema.names:
        raise BadText(f"{path} has no column {name!r}: choose one of {', '.join(map(repr, schema.names))}")
    return schema.field(name).type


def _is_text(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise BadText(f"{path}, {os.path.getsize(path)} bytes, is not a whole Parquet file: {error}") from error


def _from_parquet(chunk: Chunk, name: str) -> Iterator[str | Bad]:
    with _parquet(chunk.path) as file:
        groups = range(chunk.start, chunk.stop)
        number = sum(file.metadata.row_group(i).num_rows for i in range(chunk.start))
        try:
            for batch in file.iter_batches(1024, row_groups=list(groups), columns=[name]):
                # as bytes, so that one bad row does not spoil the others
                column = batch.column(0)
                plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
                for raw in plain.cast(pa.large_binary()).to_pylist():
                    number += 1
                    yield _cell(raw, f"{chunk.path}, row {number}", name)
        except (pa.ArrowException, OSError) as error:
            raise BadText(f"{chunk.path} cannot be read on after row {number}: {error}") from error


def _cell(raw: bytes | None, place: str, name: str) -> str | Bad:
    if raw is None:
        return Bad(f"{place}: no text in the column {name!r}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(f"{place}, byte {error.start} of its text: not valid UTF-8 ({error.reason})")
