"""Rows: the same ones from every kind of file, and every fault with its file, line and field."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.data.row_reader import BadRow, Row, is_source, left_out, read_rows

TEXT = st.text('aé\u2028\x85"{\n', max_size=6)
VALUES = st.dictionaries(TEXT, TEXT | st.integers() | st.booleans() | st.lists(TEXT), max_size=3)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(rows=st.lists(VALUES, min_size=1, max_size=4))
def test_json_comes_back_from_every_kind_of_file(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    encoded = lines(rows).encode()
    (tmp_path / "a.jsonl").write_bytes(encoded)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(encoded))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "b.jsonl.gz", "c.json"):
        found = list(read_rows(str(tmp_path / name)))
        assert [row.values for row in found] == rows
        assert found[-1].place.endswith((f":{len(rows)}", f", row {len(rows)}"))
    assert [row.values for row in read_rows(str(tmp_path))] == rows * 3


def test_parquet_rows_have_their_lists_and_objects(tmp_path: Path) -> None:
    rows = [{"n": i, "turns": [{"role": "user", "content": str(i)}], "of": {"x": "y"}} for i in range(1500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=400)
    found = list(read_rows(str(tmp_path / "rows.parquet")))
    assert [row.values for row in found] == rows
    assert found[1234].place == f"{tmp_path / 'rows.parquet'}, row 1235"


def test_a_json_file_may_be_one_row(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text('{\n "problem": "p"\n}')
    assert [row.values for row in read_rows(str(tmp_path / "1.json"))] == [{"problem": "p"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x"', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"x": 1}\n\n{"x": 1', r"a\.jsonl:3: not valid JSON"),
        ("a.jsonl", b'{"x": 1}\n' + b"[" * 200_000, r"a\.jsonl:2: not readable JSON"),
        ("a.json", b"[" * 200_000, r"a\.json: not readable JSON"),
        ("a.jsonl", b'{"x": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: not readable JSON"),
        ("a.jsonl", b'{"x": "a\x00b"}', r"a\.jsonl:1: not valid JSON \(Invalid control character"),
        ("a.jsonl", '{"x": 1}'.encode("utf-16"), r"a\.jsonl:1: not valid UTF-8"),
        ("a.jsonl", b'{"x": "\xff"}', r"a\.jsonl:1: not valid UTF-8"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: a JSON object is needed, and this is a list"),
        ("a.json", b'[{"x": 1}, 2]', r"a\.json, row 2: a JSON object is needed, and this is a number"),
        ("a.json", b'{"x": 1,\n "y"}', r"a\.json: not valid JSON .* line 2"),
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\n' * 999, mtime=0)[:-9], r"a\.jsonl\.gz cannot be read on after line"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet cannot be read on after row 0"),
        ("a.csv", b"x\n1", r"a\.csv cannot be read: give \.json, \.jsonl, \.jsonl\.gz, \.parquet"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRow, match=words):
        list(read_rows(str(tmp_path / name)))


def test_missing_and_empty_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadRow, match=r"nowhere\.jsonl': there is no such file"):
        list(read_rows(str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(BadRow, match=r"holds no \.json"):
        list(read_rows(str(tmp_path)))


def test_the_hub_is_asked_for_named_files_and_says_so_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadRow, match="must name files of a data set"):
        list(read_rows("hf://datasets/openai/gsm8k"))
    with pytest.raises(BadRow, match=r"did not come from the Hugging Face Hub .*give their path"):
        list(read_rows("hf://datasets/nobody/nothing/train-*.parquet"))


def test_names_of_files_are_told_from_those_of_generators(tmp_path: Path) -> None:
    files = ("x.json", "x.jsonl", "a/x.jsonl.gz", "x.parquet", "hf://datasets/a/b/c", str(tmp_path))
    assert all(map(is_source, files))
    assert not any(map(is_source, ("chain_sum", "gsm8k", "recipe.toml")))


def test_fields_say_what_they_must_be() -> None:
    row = Row("f:1", {"n": 7, "t": "[1", "b": True, "l": [1], "z": None, "o": '{"a": "b"}'})
    assert (row.text("n"), row.items("l"), row.part("o").text("a")) == ("7", [1], "b")
    for read, words in (
        (lambda: row.text("m"), r"f:1: the field 'm' is missing; the row has the fields 'n', 't'"),
        (lambda: row.text("z"), r"f:1: the field 'z' is null"),
        (lambda: row.text("b"), r"f:1: the field 'b' must be text, and is true or false"),
        (lambda: row.items("n"), r"f:1: the field 'n' must be a list, and is a number"),
        (lambda: row.texts("l"), r"f:1: the field 'l' must be a list of texts"),
        (lambda: row.json("t"), r"f:1: the field 't' must be JSON"),
        (lambda: row.part("l"), r"f:1: the field 'l' must hold an object, and holds a list"),
        (lambda: row.part("o").text("c"), r"f:1, o: the field 'c' is missing"),
    ):
        with pytest.raises(BadRow, match=words):
            read()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    "content",
    [
        b'{"x": 1}\n\n{"x": 2}\n',
        b'{"x": 1}\n{"x": 2}\n\n\n',
        b'\n \t\n{"x": 1}\r\n\r\n{"x": 2}\r\n',
        b'\xef\xbb\xbf{"x": 1}\n{"x": 2}',
        b'\xef\xbb\xbf\n{"x": 1}\n \xef\xbb\xbf\n\xef\xbb\xbf{"x": 2}\n',
    ],
)
def test_empty_lines_and_byte_order_marks_mean_nothing(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = list(read_rows(str(tmp_path / name)))
    assert [row.values for row in found] == [{"x": 1}, {"x": 2}]
    numbers = [n for n, line in enumerate(content.split(b"\n"), start=1) if b"x" in line]
    assert [row.place for row in found] == [f"{tmp_path / name}:{n}" for n in numbers]


def test_a_json_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf [{"x": 1}]')
    assert [row.values for row in read_rows(str(tmp_path / "a.json"))] == [{"x": 1}]


def test_rows_that_are_none_may_be_counted_instead(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x"\n7\n{"x": 2}\n')
    (tmp_path / "b.json").write_text('[{"x": 3}, "y"]')
    skipped: list[BadRow] = []
    assert [row.values["x"] for row in read_rows(str(tmp_path), on_bad=skipped.append)] == [1, 2, 3]
    assert [str(error).split(": ")[0].rsplit("/")[-1] for error in skipped] == [
        "a.jsonl:2",
        "a.jsonl:3",
        "b.json, row 2",
    ]
    assert left_out(skipped).startswith(f"Bad rows left out: 3; the first: {tmp_path / 'a.jsonl'}:2: not ")
    assert left_out([]) == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (r"\ud800", "holds half of a surrogate pair"),
        (r"a\udfffb", "holds half of a surrogate pair"),
        (float("nan"), "must be text, and is nan"),
        (float("-inf"), "must be text, and is -inf"),
    ],
)
def test_what_no_text_can_be_is_said(value: Any, words: str, tmp_path: Path) -> None:
    encoded = f'"{value}"' if isinstance(value, str) else json.dumps(value)
    (tmp_path / "a.jsonl").write_text(f'{{"x": {encoded}}}')
    (row,) = read_rows(str(tmp_path / "a.jsonl"))
    with pytest.raises(BadRow, match=f"a.jsonl:1: the field 'x' {words}"):
        row.text("x")
    if isinstance(value, str):
        with pytest.raises(BadRow, match=words):
            Row(row.place, {"x": ["a", row.values["x"]]}).texts("x")
    assert Row("p", {"x": "\U0001f600\x00"}).text("x") == "\U0001f600\x00"
