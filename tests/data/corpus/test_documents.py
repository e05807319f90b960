"""Whatever the chunks, a file gives the same documents; what is wrong is said with file and line, row or byte."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.data.corpus.documents import BadText, Reading, cut, find_files, read_documents
from lockstep.data.json_text import Bad

LINE = Reading(separator="--")
some_text = st.text(st.sampled_from('ab \n"\\é😀\u2028\x00'), max_size=12)


WHOLE = Reading()


def read(path: Path, reading: Reading = WHOLE, size: int = 1 << 20) -> list[str | Bad]:
    return [d for chunk in cut(path, reading, size) for d in read_documents(chunk, reading)]


def reasons(path: Path, reading: Reading = WHOLE, size: int = 1 << 20) -> list[str]:
    """What is said of the bad rows, with the file's path left out."""
    found = read(path, reading, size)
    assert any(isinstance(d, str) for d in found)
    return [d.reason.replace(str(path), "FILE") for d in found if isinstance(d, Bad)]


@settings(max_examples=40)
@given(texts=st.lists(some_text, max_size=8), size=st.integers(1, 60))
def test_json_lines_in_any_chunks(tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int) -> None:
    path = tmp_path_factory.mktemp("t") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"id": 1, "text": t}, ensure_ascii=False) for t in texts), encoding="utf-8")
    assert read(path, size=size) == texts
    zipped = path.with_name("a.jsonl.gz")
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read(zipped, size=size) == texts


@settings(max_examples=60)
@given(lines=st.lists(st.sampled_from(["--", "a", "bb", "", "- -", "é"]), max_size=14), size=st.integers(1, 30))
def test_separated_text_in_any_chunks(tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int) -> None:
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    expected, open_lines = [], list[str]()
    for line in [*path.read_text().splitlines(keepends=True), "--"]:
        if line.rstrip("\n") != "--":
            open_lines.append(line)
        elif open_lines:
            expected.append("".join(open_lines))
            open_lines = []
    assert read(path, LINE, size) == expected


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\n\nb\n")
    assert read(path, size=1) == ["a\n\nb\n"]
    path.write_text("")
    assert read(path) == [""]
    assert read(path, LINE) == []


@pytest.mark.parametrize("size", [1, 20, 1 << 20])
def test_byte_order_marks_and_empty_lines_mean_nothing(tmp_path: Path, size: int) -> None:
    bom, path = b"\xef\xbb\xbf", tmp_path / "a.jsonl"
    path.write_bytes(bom + b'{"text": "a"}\n\n \r\n{"text": "b"}\r\n\n')
    assert read(path, size=size) == ["a", "b"]
    (tmp_path / "a.txt").write_bytes(bom + b"a\n--\n\xef\xbb\xbfb")
    assert read(tmp_path / "a.txt", size=size) == ["a\n--\n\ufeffb"]
    assert read(tmp_path / "a.txt", LINE, size) == ["a\n", "\ufeffb"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet_in_any_chunks(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"é{i}" for i in range(23)]
    column = pa.array([t.encode() for t in texts] if kind == pa.binary() else texts)
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": pa.array(range(23)), "text": column}), path, row_group_size=5)
    for size in (1, 100, 1 << 20):
        assert read(path, size=size) == texts
    assert len(cut(path, Reading(), 1)) == 5
    assert len(cut(path, Reading(), 1 << 20)) == 1


@pytest.mark.parametrize("size", [9, 30, 1 << 20])
def test_bad_json_lines(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": ',
        b"",
        b'{"title": "x", "id": 2}',
        b"{}",
        b'{"text": null}',
        b'{"text": 3}',
        b'["text"]',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 5000,
        b'{"text": "good"}',
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    offset = path.read_bytes().index(b"\xff")
    found = reasons(path, size=size)
    assert found[8].startswith("FILE:11: not readable JSON (")
    assert found[:8] == [
        "FILE:2: not valid JSON (Expecting value at column 10)",
        "FILE:4: no text in the field 'text'; the row has 'title', 'id'",
        "FILE:5: no text in the field 'text'; the row has no fields",
        "FILE:6: no text in the field 'text'; the row has 'text'",
        "FILE:7: the field 'text' is no text but int",
        "FILE:8: a JSON object with the field 'text' is needed, and this is list",
        f"FILE:9: byte {offset}: not valid UTF-8 (invalid start byte)",
        "FILE:10: the field 'text' holds half of a surrogate pair",
    ]


def test_bad_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n--\nb\xff\n--\nc\n")
    assert reasons(path, LINE) == ["FILE, byte 9: not valid UTF-8 (invalid start byte)"]
    assert read(path) == [Bad(f"{path}, byte 9: not valid UTF-8 (invalid start byte)")]


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    spoilt = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
    )
    column = pa.chunked_array([spoilt, pa.array([None, "good"])])
    pq.write_table(pa.table({"text": column, "n": pa.array(range(5))}), path, row_group_size=2)
    for size in (1, 1 << 20):
        assert reasons(path, size=size) == [
            "FILE, row 2, byte 0 of its text: not valid UTF-8 (invalid start byte)",
            "FILE, row 4: no text in the column 'text'",
        ]
    with pytest.raises(BadText, match=r"a\.parquet has no column 'body': choose one of 'text', 'n'$"):
        read(path, Reading("body"))
    with pytest.raises(BadText, match=r"a\.parquet: column 'n' is no text but int64$"):
        read(path, Reading("n"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(BadText, match=rf"a\.parquet, {len(whole) - 5} bytes, is not a whole Parquet file: "):
        read(path)


def test_a_truncated_gz_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    line = b'{"text": "a"}\n'
    path.write_bytes(gzip.compress(line * 3)[:-9])
    with pytest.raises(BadText, match=r"a\.jsonl\.gz cannot be read on after byte \d+ of its text: "):
        read(path)


def test_inputs_are_found_or_refused(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "deep/c.parquet", "README.md", "deep/x.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found, others = find_files([tmp_path])
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ["a.jsonl", "b.txt", "deep/c.parquet"]
    assert [p.name for p in others] == ["README.md", "x.csv"]
    assert find_files([tmp_path / "b.txt", tmp_path / "a.jsonl"])[0] == [tmp_path / "b.txt", tmp_path / "a.jsonl"]
    (tmp_path / "empty").mkdir()
    for inputs, words in (
        ([tmp_path / "none.txt"], "there is no file .*none.txt$"),
        ([tmp_path / "README.md"], r"README\.md cannot be read: give \.txt, \.jsonl, \.jsonl\.gz, \.parquet files"),
        ([tmp_path / "empty"], "empty holds no "),
        ([tmp_path, tmp_path / "b.txt"], r"b\.txt is given twice$"),
    ):
        with pytest.raises(BadText, match=words):
            find_files(inputs)
