"""Reads rows of data sets from JSON, JSON lines and Parquet, in local files or a data set on the Hugging Face Hub.

A row knows its file and line, so that errors name file, line and field.
"""

import gzip
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lockstep.data.json_text import Bad, encodable, parsed_json

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet")
HUB = "hf://datasets/"
"""Prefix of files on the Hub: `hf://datasets/openai/gsm8k/main/test-*.parquet`."""


class BadRow(ValueError):
    """A row that cannot be used, or a file without rows; the message names file, line and field."""


OnBad = Callable[[BadRow], None]
"""What is done with the error of a bad row: it is raised, or kept to be counted, and the row is skipped."""

_BLANK = b" \t\r\n\v\f\xef\xbb\xbf"
"""White space, and the byte order mark."""


@dataclass(frozen=True)
class Row:
    """The fields of one row, with typed access that raises `BadRow`."""

    place: str
    """File and line, or file and row."""
    values: Mapping[str, Any]

    def has(self, *names: str) -> bool:
        """Whether all these fields exist and are not empty."""
        return all(self.values.get(name) not in (None, "") for name in names)

    def text(self, name: str) -> str:
        """The value of a text field; a number is converted to text.

        Raises:
            BadRow: when it is not there, or something else.
        """
        value = self._needed(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.bad(name, f"must be text, and is {_kind(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.bad(name, f"must be text, and is {value}")
        return self.sound(name, str(value))

    def sound(self, name: str, text: str) -> str:
        """The text itself, if it can be encoded.

        Raises:
            BadRow: where it holds half of a surrogate pair.
        """
        if not encodable(text):
            raise self.bad(name, "holds half of a surrogate pair")
        return text

    def texts(self, name: str) -> list[str]:
        """The value of a field that is a list of texts.

        Raises:
            BadRow: when it is not there, or something else.
        """
        values = self.items(name)
        if not all(isinstance(value, str) for value in values):
            raise self.bad(name, "must be a list of texts")
        return [self.sound(name, value) for value in values]

    def items(self, name: str) -> list[Any]:
        """The value of a field that is a list.

        Raises:
            BadRow: when it is not there, or something else.
        """
        value = self._needed(name)
        if not isinstance(value, list):
            raise self.bad(name, f"must be a list, and is {_kind(value)}")
        return value

    def part(self, name: str) -> "Row":
        """The value of a field that is an object, or JSON text of one, as a row of its own.

        Raises:
            BadRow: when it is not there, or something else.
        """
        return Row(f"{self.place}, {name}", self.checked(name, self.json(name), dict))

    def json(self, name: str) -> Any:
        """The value of a field, parsed where it is JSON text.

        Raises:
            BadRow: when it is not there, or is text and no JSON.
        """
        value = self._needed(name)
        parsed = parsed_json(value) if isinstance(value, str) else value
        if isinstance(parsed, Bad):
            raise self.bad(name, f"must be JSON: {parsed.reason}")
        return parsed

    def checked(self, name: str, value: Any, kind: type) -> Any:
        """The value itself, if it is of this type.

        Raises:
            BadRow: if it is not.
        """
        if not isinstance(value, kind):
            raise self.bad(name, f"must hold {_NAMES[kind]}, and holds {_kind(value)}")
        return value

    def bad(self, name: str, reason: str) -> BadRow:
        """The error for a field, with file and line."""
        return BadRow(f"{self.place}: the field {name!r} {reason}")

    def _needed(self, name: str) -> Any:
        if self.values.get(name) is None:
            there = ", ".join(map(repr, self.values)) or "none"
            raise self.bad(
                name, f"is missing; the row has the fields {there}" if name not in self.values else "is null"
            )
        return self.values[name]


_NAMES: Mapping[type, str] = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


def _kind(value: object) -> str:
    return _NAMES.get(type(value), "a number")


def is_source(name: str) -> bool:
    """Whether a name means files: by its suffix, as an existing folder, or as files on the Hub."""
    return name.startswith(HUB) or name.endswith(SUFFIXES) or Path(name).is_dir()


def stop(error: BadRow) -> None:
    """Raise the error of a bad row."""
    raise error


def left_out(skipped: Sequence[BadRow]) -> str:
    """A sentence that counts skipped rows and quotes the first; empty where there are none."""
    return f"Bad rows left out: {len(skipped)}; the first: {skipped[0]}" if skipped else ""


def read_rows(name: str, *, on_bad: OnBad = stop) -> Iterator[Row]:
    """Read the rows of a file, of a folder's files in alphabetical order, or of files on the Hub.

    Empty lines are no rows.

    Args:
        name: a path, or `hf://datasets/owner/name/files`, where files may have shell wildcards.
        on_bad: called with the error of each row that is no object, which is skipped; the default raises it.

    Raises:
        BadRow: says what cannot be read, with the file, and with the line or row.
    """
    for path in _files(name):
        if path.suffix == ".parquet":
            yield from _parquet(path)
            continue
        for found in _json(path) if path.suffix == ".json" else _lines(path):
            if isinstance(found, Row):
                yield found
            else:
                on_bad(found)


def _files(name: str) -> list[Path]:
    if name.startswith(HUB):
        return _from_hub(name)
    path = Path(name)
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.name.endswith(SUFFIXES) and p.is_file()]
        if not found:
            raise BadRow(f"{path} holds no {', '.join(SUFFIXES)} files")
        return found
    if not path.is_file():
        raise BadRow(f"{name!r}: there is no such file")
    if not path.name.endswith(SUFFIXES):
        raise BadRow(f"{path} cannot be read: give {', '.join(SUFFIXES)} files, a folder of them, or {HUB}…")
    return [path]


def _from_hub(name: str) -> list[Path]:
    owner, _, rest = name.removeprefix(HUB).partition("/")
    repository, _, pattern = rest.partition("/")
    if not pattern:
        raise BadRow(f"{name!r} must name files of a data set, as {HUB}openai/gsm8k/main/test-*.parquet does")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(f"{owner}/{repository}", repo_type="dataset", allow_patterns=[pattern]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise BadRow(
            f"{name!r} did not come from the Hugging Face Hub ({type(error).__name__}): correct the name, or download "
            "the files where there is a network and give their path"
        ) from error
    found = [p for p in sorted(folder.glob(pattern)) if p.name.endswith(SUFFIXES)]
    if not found:
        raise BadRow(f"{name!r}: the data set {owner}/{repository} has no {', '.join(SUFFIXES)} files of this name")
    return found


def _lines(path: Path) -> Iterator[Row | BadRow]:
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip(_BLANK):
                    yield _row(f"{path}:{number}", line.removesuffix(b"\n"))
    except (EOFError, OSError, zlib.error) as error:
        raise BadRow(f"{path} cannot be read on after line {number}: {error}") from error


def _row(place: str, raw: bytes) -> Row | BadRow:
    value = _parsed(raw)
    return BadRow(f"{place}: {value.reason}") if isinstance(value, Bad) else _object(place, value)


def _parsed(raw: bytes) -> Any | Bad:
    """Parse JSON in UTF-8, with or without a byte order mark."""
    try:
        return parsed_json(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Bad(f"not valid UTF-8 ({error.reason} at byte {error.start})")


def _object(place: str, value: Any) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(f"{place}: a JSON object is needed, and this is {_kind(value)}")
    return Row(place, value)


def _json(path: Path) -> Iterator[Row | BadRow]:
    """A list of rows, or one row alone, as MATH has them."""
    try:
        value = _parsed(path.read_bytes())
    except OSError as error:
        raise BadRow(f"{path} cannot be read: {error}") from error
    if isinstance(value, Bad):
        raise BadRow(f"{path}: {value.reason}")
    if isinstance(value, list):
        yield from (_object(f"{path}, row {number}", each) for number, each in zip(count(1), value, strict=False))
    else:
        yield _object(str(path), value)


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
    except (pa.ArrowException, OSError) as error:
        raise BadRow(f"{path} cannot be read on after row {number}: {error}") from error
