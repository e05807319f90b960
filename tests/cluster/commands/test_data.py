"""Commands make a tokenizer and an indexed dataset; a mistake of the user ends with one sentence and code 2."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import Result

from lockstep.data.corpus.indexed_dataset import IndexedDataset
from lockstep.data.tokenizer import Tokenizer
from lockstep.model.formats.registry import tokenizer_files
from tests.cluster import cli_process


def lockstep(*arguments: object) -> Result:
    """The command, in this process."""
    return cli_process.lockstep("data", *map(str, arguments))


def refused(*arguments: object) -> str:
    """The one sentence that a command ends with, its last line."""
    result = lockstep(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20)))
    (folder / "b.txt").write_text("one\n\ntwo\n")
    pq.write_table(pa.table({"text": ["three", "four"]}), folder / "c.parquet")
    (folder / "README.md").write_text("not read")
    return folder


@pytest.mark.parametrize("command", ["tokenize", "tokenizer"])
def test_help_has_an_example_on_a_line_of_its_own(command: str) -> None:
    result = lockstep(command, "--help")
    assert result.exit_code == 0
    assert any(line.strip().startswith(f"Example: lockstep data {command} ") for line in result.output.splitlines())


def test_from_text_to_a_tokenizer_to_a_store(tmp_path: Path, text: Path) -> None:
    learned = lockstep("tokenizer", text, tmp_path / "tok", "--vocabulary", 270, "--special", "<|pad|>")
    assert learned.exit_code == 0, learned.output
    assert learned.stdout.startswith(f"wrote {tmp_path / 'tok'}: ")
    assert "left out 1 files with other endings" in learned.stderr
    command = "tokenize", text, tmp_path / "out" / "s", "--tokenizer", tmp_path / "tok", "--separator", ""
    made = lockstep(*command, "--workers", 2)
    assert made.exit_code == 0, made.output
    store, tokenizer = IndexedDataset(tmp_path / "out" / "s"), Tokenizer(tokenizer_files(str(tmp_path / "tok")))
    found = [tokenizer.decode(store.document(i)[:-1].tolist()) for i in range(store.documents)]
    assert found == [*(f"row {i}" for i in range(20)), "one\n", "two\n", "three", "four"]
    assert made.stdout == (f"{tmp_path}/out/s: {store.tokens} tokens in 24 documents from 24 rows, 0 skipped\n")
    assert lockstep(*command).stdout == made.stdout


def test_a_model_s_tokenizer_and_several_inputs(tmp_path: Path, text: Path, tiny_folder: Path) -> None:
    inputs = text / "c.parquet", text / "a.jsonl"
    made = lockstep("tokenize", *inputs, tmp_path / "s", "--tokenizer", tiny_folder, "--end", "<|endoftext|>")
    assert made.exit_code == 0, made.output
    store = IndexedDataset(tmp_path / "s")
    assert store.documents == 22
    assert int(store.document(0)[-1]) == 0
    assert store.note
    assert store.note.tokenizer == Tokenizer(tokenizer_files(str(tiny_folder))).digest


def test_bad_rows_stop_or_are_said_and_skipped(tmp_path: Path, text: Path, tiny_folder: Path) -> None:
    path = text / "d.jsonl"
    path.write_text('{"text": "x"}\n' + "{}\n" * 25)
    command = "tokenize", path, tmp_path / "s", "--tokenizer", tiny_folder
    assert refused(*command) == (
        f"error: {path}:2: no text in the field 'text'; the row has no fields: correct it, or have bad rows counted "
        "and skipped (on-bad skip)"
    )
    made = lockstep(*command, "--on-bad", "skip")
    assert made.stdout.endswith(" tokens in 1 documents from 26 rows, 25 skipped\n")
    assert f"skipped {path}:2: no text in the field 'text'" in made.stderr
    assert made.stderr.splitlines()[-1] == "and 5 more"


def test_mistakes_are_one_sentence(tmp_path: Path, text: Path, tiny_folder: Path) -> None:
    tokenizer = "--tokenizer", tiny_folder
    for arguments, words in (
        (("tokenize", text / "none.jsonl", tmp_path / "s", *tokenizer), "there is no file"),
        (("tokenize", text / "README.md", tmp_path / "s", *tokenizer), "README.md cannot be read: give .txt"),
        (("tokenize", text, tmp_path / "s", "--tokenizer", text), "text"),
        (("tokenize", text, tmp_path / "s", *tokenizer, "--on-bad", "drop"), "--on-bad 'drop' is not known"),
        (("tokenize", text, tmp_path / "s", *tokenizer, "--field", "body"), "c.parquet has no column 'body'"),
        (("tokenize", text, tmp_path / "s", *tokenizer, "--end", "<eos>"), "has no token '<eos>'"),
        (("tokenizer", text, text), "exists: give a folder that does not"),
        (("tokenizer", text, tmp_path / "tok", "--vocabulary", "9"), "ask for 257 or more"),
    ):
        sentence = refused(*arguments)
        assert sentence.startswith("error: ")
        assert words in sentence
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text"]


def test_a_hub_name_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sentence = refused("tokenizer", "nobody/nothing", tmp_path / "tok")
    assert sentence.startswith("error: there is no file or folder 'nobody/nothing' here, and the Hugging Face Hub gave")
