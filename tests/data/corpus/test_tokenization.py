"""Tokenizing in parallel, killed or not, gives the bytes that one process gives; bad rows stop it or are counted."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lockstep.data.corpus import tokenization
from lockstep.data.corpus.documents import BadText, Reading
from lockstep.data.corpus.indexed_dataset import IndexedDataset
from lockstep.data.corpus.tokenization import BadCorpus, Tokenization, tokenization_of, tokenize
from lockstep.data.tokenizer import BadTokenizer, Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[3]
SHAKESPEARE = ROOT.parent / "shared" / "datasets" / "tinyshakespeare" / "input.txt"
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return train_tokenizer(["once upon a time there was a café of 12 tables"] * 3, 300, special=["<|pad|>"])


@pytest.fixture(scope="module")
def tokenizer(files: dict[str, str]) -> Tokenizer:
    return Tokenizer(files)


@pytest.fixture(scope="module")
def how(tokenizer: Tokenizer) -> Tokenization:
    return tokenization_of(tokenizer)


def write_rows(path: Path, rows: int) -> list[str]:
    texts = [f"row {i} was of a café " + "upon a time " * (i % 5) if i % 7 else "" for i in range(rows)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return texts


def decoded(store: IndexedDataset, tokenizer: Tokenizer) -> list[str]:
    """Texts of a store's documents, without the token that ends them."""
    documents = [store.document(i).tolist() for i in range(store.documents)]
    assert all(d[-1] == tokenizer.eos for d in documents)
    return [tokenizer.decode(d[:-1]) for d in documents]


def files_of(store: Path) -> list[bytes]:
    return [store.with_name(store.name + suffix).read_bytes() for suffix in (".bin", ".idx", ".json")]


def test_all_formats_become_one_store(tmp_path: Path, tokenizer: Tokenizer, how: Tokenization) -> None:
    texts = write_rows(tmp_path / "a.jsonl", 30)
    (tmp_path / "b.txt").write_text("a time\n\nthere was\n")
    pq.write_table(pa.table({"text": ["é", "", "12"]}), tmp_path / "c.parquet")
    note = tokenize([tmp_path], tmp_path / "out" / "all", how)
    store = IndexedDataset(tmp_path / "out" / "all")
    assert decoded(store, tokenizer) == [*texts, "a time\n\nthere was\n", "é", "", "12"]
    assert store.note == note
    assert (note.tokenizer, note.vocabulary, note.end) == (tokenizer.digest, tokenizer.vocabulary, tokenizer.eos)
    assert (note.documents, note.tokens, note.rows, note.skipped) == (34, store.tokens, 34, 0)
    assert [(Path(s.path).name, s.rows) for s in note.sources] == [("a.jsonl", 30), ("b.txt", 1), ("c.parquet", 3)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["all.bin", "all.idx", "all.json"]


def test_processes_give_the_bytes_of_one(tmp_path: Path, how: Tokenization) -> None:
    write_rows(tmp_path / "a.jsonl", 200)
    tokenize([tmp_path / "a.jsonl"], tmp_path / "one", how, chunk_bytes=2000)
    tokenize([tmp_path / "a.jsonl"], tmp_path / "two", how, chunk_bytes=2000, workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


KILLED = """
import sys
from pathlib import Path
from lockstep.data.corpus.tokenization import tokenization_of, tokenize
from lockstep.data.tokenizer import Tokenizer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    files = {p.name: p.read_text() for p in (folder / "tokenizer").iterdir()}
    tokenize([folder / "a.jsonl"], folder / "out", tokenization_of(Tokenizer(files)), workers=2, chunk_bytes=4000)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, files: dict[str, str], how: Tokenization) -> None:
    write_rows(tmp_path / "a.jsonl", 6000)
    (tmp_path / "tokenizer").mkdir()
    for name, text in files.items():
        (tmp_path / "tokenizer" / name).write_text(text)
    (tmp_path / "killed.py").write_text(KILLED)
    run = subprocess.Popen([sys.executable, str(tmp_path / "killed.py"), str(tmp_path)])
    parts = tmp_path / "out.parts"
    while len(list(parts.glob("*.idx"))) < 2:
        assert run.poll() is None
        time.sleep(0.005)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]  # workers end with their parent
    finished = len(list(parts.glob("*.idx")))
    assert not (tmp_path / "out.idx").exists()

    seen: list[tuple[int, int]] = []
    tokenize([tmp_path / "a.jsonl"], tmp_path / "out", how, chunk_bytes=4000, progress=lambda *done: seen.append(done))
    assert 2 <= seen[0][0] == finished < seen[0][1]
    assert [done for done, _ in seen] == list(range(finished, seen[0][1] + 1))
    tokenize([tmp_path / "a.jsonl"], tmp_path / "whole", how, chunk_bytes=4000)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not parts.exists()


class Killed(BaseException):
    """Stands for a kill at a place that the test chooses."""


def test_a_kill_at_any_chunk_or_while_files_get_their_names(tmp_path: Path, how: Tokenization) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    write_rows(source, 40)
    tokenize([source], tmp_path / "whole", how, chunk_bytes=900)

    def kill_at(chunk: int) -> None:
        def progress(done: int, _: int) -> None:
            if done == chunk:
                raise Killed

        with pytest.raises(Killed):
            tokenize([source], out, how, chunk_bytes=900, progress=progress)

    for chunk in (0, 1, 3):
        kill_at(chunk)
        assert len(list((tmp_path / "out.parts").glob("*.idx"))) == chunk
    (tmp_path / "out.bin.123.partial").write_text("a join that was killed")
    (tmp_path / "out.bin").write_text("named before the kill")
    tokenize([source], out, how, chunk_bytes=900)
    assert files_of(out) == files_of(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.json"]


def test_a_changed_input_or_setting_makes_its_parts_again(
    tmp_path: Path, tokenizer: Tokenizer, how: Tokenization
) -> None:
    texts = [write_rows(tmp_path / f"{name}.jsonl", 5) for name in "ab"]
    bad = tmp_path / "c.jsonl"
    bad.write_text('{"title": 1}\n')
    with pytest.raises(BadText):
        tokenize([tmp_path], tmp_path / "out", how)
    bad.write_text('{"text": "of a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "was"}\n')
    seen: list[int] = []
    tokenize([tmp_path], tmp_path / "out", how, progress=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3]
    assert decoded(IndexedDataset(tmp_path / "out"), tokenizer) == [*texts[0], "was", "of a"]


def test_a_damaged_part_is_made_again(tmp_path: Path, how: Tokenization) -> None:
    source = tmp_path / "a.jsonl"
    write_rows(source, 40)
    tokenize([source], tmp_path / "whole", how, chunk_bytes=900)

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        tokenize([source], tmp_path / "out", how, chunk_bytes=900, progress=interrupt)
    part = tmp_path / "out.parts" / "000000.bin"
    part.write_bytes(part.read_bytes()[:-1])
    tokenize([source], tmp_path / "out", how, chunk_bytes=900)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_what_is_made_is_left_alone_and_what_is_not_ours_is_not_overwritten(tmp_path: Path, how: Tokenization) -> None:
    source = tmp_path / "a.jsonl"
    write_rows(source, 9)
    first = tokenize([source], tmp_path / "out", how)
    before = (tmp_path / "out.bin").stat().st_mtime_ns
    assert tokenize([source], tmp_path / "out.bin", how) == first
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before
    write_rows(source, 10)
    with pytest.raises(BadCorpus, match=r"out\.idx exists and was made from other input or with other settings: "):
        tokenize([source], tmp_path / "out", how)
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(BadCorpus, match=r"mine\.json exists and belongs to no store: remove it or choose another name"):
        tokenize([source], tmp_path / "mine", how)


def edit(path: Path, content: bytes) -> None:
    """Replace a file's content by one of equal size; its time of modification stays."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "folder/a.txt"])
def test_an_edited_text_of_equal_size_and_time_gives_no_stale_tokens(
    name: str, tmp_path: Path, tokenizer: Tokenizer, how: Tokenization
) -> None:
    source = tmp_path / name
    source.parent.mkdir(exist_ok=True)
    one, other = (b'{"text": "%s"}\n' % word for word in (b"once", b"time"))
    if name.endswith(".gz"):
        one, other = gzip.compress(one, 0, mtime=0), gzip.compress(other, 0, mtime=0)
    source.write_bytes(one)
    tokenize([source.parent], tmp_path / "out" / "all", how)
    assert tokenize([source.parent], tmp_path / "out" / "all", how).documents == 1
    edit(source, other)
    with pytest.raises(BadCorpus, match=r"all\.idx exists and was made from other input"):
        tokenize([source.parent], tmp_path / "out" / "all", how)
    tokenize([source.parent], tmp_path / "out" / "new", how)
    (text,) = decoded(IndexedDataset(tmp_path / "out" / "new"), tokenizer)
    assert "time" in text
    assert "once" not in text


def test_a_file_that_is_touched_or_copied_is_the_same_input(tmp_path: Path, how: Tokenization) -> None:
    source = tmp_path / "a.jsonl"
    write_rows(source, 9)
    first = tokenize([source], tmp_path / "out", how)
    source.touch()
    assert tokenize([source], tmp_path / "out", how) == first
    content = source.read_bytes()
    source.unlink()
    source.write_bytes(content)
    assert tokenize([source], tmp_path / "out", how) == first


def test_parts_of_an_edited_text_are_made_again(tmp_path: Path, tokenizer: Tokenizer, how: Tokenization) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "once"}\n' * 4)

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        tokenize([source], tmp_path / "out", how, chunk_bytes=17, progress=interrupt)
    edit(source, b'{"text": "time"}\n' * 4)
    tokenize([source], tmp_path / "out", how, chunk_bytes=17)
    assert decoded(IndexedDataset(tmp_path / "out"), tokenizer) == ["time"] * 4


def test_a_text_that_is_edited_while_it_is_read_is_no_input(tmp_path: Path, how: Tokenization) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "once"}\n' * 4)

    def change(done: int, _: int) -> None:
        if done == 2:
            edit(source, b'{"text": "time"}\n' * 4)

    with pytest.raises(BadCorpus, match=r"a\.jsonl was changed while it was tokenized: run the same command again"):
        tokenize([source], tmp_path / "out", how, chunk_bytes=17, progress=change)
    assert not (tmp_path / "out.idx").exists()
    assert tokenize([source], tmp_path / "out", how, chunk_bytes=17).documents == 4


def test_two_runs_do_not_make_the_same_store(tmp_path: Path, how: Tokenization) -> None:
    write_rows(tmp_path / "a.jsonl", 9)

    def second(done: int, _: int) -> None:
        if done == 0:
            with pytest.raises(BadCorpus, match=r"another run is at work in .*out\.parts: wait for it or end it$"):
                tokenize([tmp_path / "a.jsonl"], tmp_path / "out", how)

    tokenize([tmp_path / "a.jsonl"], tmp_path / "out", how, progress=second)
    assert IndexedDataset(tmp_path / "out").documents == 9


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_row_stops_or_all_are_counted(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    path = tmp_path / "a.jsonl"
    rows = [b'{"text": "%d"}' % i for i in range(60)]
    rows[20], rows[40], rows[41] = b'{"text": "\xff"}', b"{}", b"x"
    path.write_bytes(b"\n".join(rows))
    with pytest.raises(BadText) as caught:
        tokenize([path], tmp_path / "out", tokenization_of(tokenizer), workers=workers, chunk_bytes=100)
    offset = path.read_bytes().index(b"\xff")
    assert str(caught.value) == (
        f"{path}:21: byte {offset}: not valid UTF-8 (invalid start byte): correct it, or have bad rows counted and "
        "skipped (on-bad skip)"
    )
    assert not (tmp_path / "out.idx").exists()
    skip = tokenization_of(tokenizer, on_bad="skip")
    note = tokenize([path], tmp_path / "out", skip, workers=workers, chunk_bytes=100)
    assert (note.rows, note.skipped, note.documents) == (60, 3, 57)
    assert [e.split(": ")[0] for e in note.examples] == [f"{path}:{n}" for n in (21, 41, 42)]
    good = [str(i) for i in range(60) if i not in (20, 40, 41)]
    assert decoded(IndexedDataset(tmp_path / "out"), tokenizer) == good


def test_nothing_left_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text("x\ny\n")
    (tmp_path / "b.jsonl").write_text("")
    skip = tokenization_of(tokenizer, on_bad="skip")
    with pytest.raises(BadCorpus, match=r"^no document is left of 2 files and 2 rows, 2 of them bad: give files with"):
        tokenize([tmp_path], tmp_path / "out", skip)
    assert not list(tmp_path.glob("out.bin*"))


def test_the_end_of_a_document_can_be_named(files: dict[str, str], tokenizer: Tokenizer) -> None:
    assert tokenization_of(tokenizer).end == tokenizer.token(END) == 0
    assert tokenization_of(tokenizer, end="<|pad|>").end == 1
    with pytest.raises(BadTokenizer, match="the tokenizer has no token '<eos>'"):
        tokenization_of(tokenizer, end="<eos>")
    nameless = Tokenizer({"tokenizer.json": files["tokenizer.json"]})
    with pytest.raises(BadTokenizer, match="does not say which token ends a text: name one with end=TOKEN"):
        tokenization_of(nameless)


def test_documents_begin_with_bos_where_the_tokenizer_adds_it(tmp_path: Path, files: dict[str, str]) -> None:
    values = json.loads(files["tokenizer.json"])
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, other],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}},
    }
    made = Tokenizer(files | {"tokenizer.json": json.dumps(values)})
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n')
    tokenize([tmp_path / "a.jsonl"], tmp_path / "out", tokenization_of(made))
    store = IndexedDataset(tmp_path / "out")
    assert [store.document(i).tolist() for i in range(2)] == [[7, *made.encode("one"), made.eos], [7, made.eos]]


def test_numbers_that_a_tokenizer_leaves_out_cost_no_token(tmp_path: Path, files: dict[str, str]) -> None:
    values = json.loads(files["tokenizer.json"])
    values["model"]["vocab"]["w"] = 70_000
    sparse = Tokenizer({**files, "tokenizer.json": json.dumps(values)})
    write_rows(tmp_path / "a.jsonl", 5)
    note = tokenize([tmp_path / "a.jsonl"], tmp_path / "out", tokenization_of(sparse))
    store = IndexedDataset(tmp_path / "out")
    assert (note.vocabulary, store.dtype.itemsize) == (70_001, 4)
    assert 70_000 in store.document(1)
    assert decoded(store, sparse)[1].startswith("row 1 was")


def test_a_dead_worker_is_one_sentence(tmp_path: Path, how: Tokenization, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "a.jsonl", 60)
    monkeypatch.setattr(tokenization, "_start_worker", killed_worker)
    with pytest.raises(BadCorpus, match="a worker process died, perhaps for want of memory: run the same command"):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "out", how, workers=2, chunk_bytes=100)
    monkeypatch.undo()
    tokenize([tmp_path / "a.jsonl"], tmp_path / "out", how, chunk_bytes=100)


def killed_worker() -> None:
    """Stands for a worker that the kernel ended."""
    signal.raise_signal(signal.SIGKILL)


def test_texts_are_read_in_order(tmp_path: Path) -> None:
    expected = write_rows(tmp_path / "a.jsonl", 9)
    (tmp_path / "b.jsonl").write_text('x\n{"text": "last"}\n')
    skipped: list[str] = []
    assert list(tokenization.texts([tmp_path], Reading(), "skip", skipped)) == [*expected, "last"]
    assert skipped == [f"{tmp_path}/b.jsonl:1: not valid JSON (Expecting value at column 1)"]
    with pytest.raises(BadText, match=r"b\.jsonl:1: not valid JSON"):
        list(tokenization.texts([tmp_path], Reading(), "stop", []))


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"needs {SHAKESPEARE}")
def test_a_real_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    speeches = tokenization_of(tokenizer, reading=Reading(separator=""))
    note = tokenize([SHAKESPEARE], tmp_path / "out", speeches, chunk_bytes=200_000)
    texts = SHAKESPEARE.read_text().split("\n\n")
    assert "".join(decoded(IndexedDataset(tmp_path / "out"), tokenizer)) == "".join(t.strip("\n") + "\n" for t in texts)
    assert note.documents == len(texts)


def test_stores_of_any_size_take_the_same_tokens(tmp_path: Path, how: Tokenization) -> None:
    """Chunks decide nothing but the parts."""
    write_rows(tmp_path / "a.jsonl", 50)
    stores = []
    for size in (300, 3000, 1 << 20):
        tokenize([tmp_path / "a.jsonl"], tmp_path / f"out{size}", how, chunk_bytes=size)
        stores.append(files_of(tmp_path / f"out{size}")[:2])
    assert stores[0] == stores[1] == stores[2]


def test_a_store_without_its_note_is_not_taken_for_ours(tmp_path: Path, how: Tokenization) -> None:
    write_rows(tmp_path / "a.jsonl", 5)
    tokenize([tmp_path / "a.jsonl"], tmp_path / "out", how)
    (tmp_path / "out.json").unlink()
    with pytest.raises(BadCorpus, match="exists and was made from other input"):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "out", how)
