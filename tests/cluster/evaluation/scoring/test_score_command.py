"""`lockstep score`: its rows and summary, rolling windows, what it refuses before ranks start, and its page."""

import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from lockstep.cluster.cli import app
from lockstep.cluster.evaluation.scoring.windows import rolling_windows
from lockstep.data.tokenizer import Tokenizer
from tests.cluster.cli_process import Command, refused

ROOT = Path(__file__).parents[3]
LONG = "State the final answer: 12 + 34 = naïve 🦊. " * 12
LINES = [
    {"id": "whole", "text": LONG},
    {"prompt": "12 + ", "completion": "34 = 46"},
    {"id": 7, "text": ""},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho 🦊"}]},
]


def score(*given: str, lines: str | None = None) -> Result:
    return CliRunner().invoke(app, ["score", *given], input=lines, catch_exceptions=False)


def test_rows_have_totals_and_tokens_and_long_texts_roll(
    tiny_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "scores.jsonl"
    given = ["-", "--model", str(tiny_folder), "--dtype", "float32", "--window", "40", "--stride", "10"]
    lines = "\n".join(json.dumps(line) for line in LINES)
    result = score(*given, "--per-token", "--out", str(out), lines=lines)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["index"], row.get("id")) for row in rows] == [(0, "whole"), (1, None), (2, 7), (3, None)]
    empty = rows[2]
    assert (empty["logprob"], empty["tokens"], empty["perplexity"], empty["bits_per_byte"]) == (0, 0, None, None)
    for row, scored in zip(rows, (LONG, "34 = 46", "", "ho 🦊<|im_end|>"), strict=True):
        assert tokenizer.decode(row["token_ids"], skip_special=False) == scored
        assert row["token_texts"] == [tokenizer.decode([token], skip_special=False) for token in row["token_ids"]]
        assert len(row["token_ids"]) == len(row["token_logprobs"]) == row["tokens"]
        assert row["logprob"] == pytest.approx(sum(row["token_logprobs"]))
        if row["tokens"]:
            assert row["perplexity"] == pytest.approx(math.exp(-row["logprob"] / row["tokens"]))
            assert row["bits_per_byte"] == pytest.approx(-row["logprob"] / math.log(2) / len(scored.encode()))
    assert rows[0]["token_logprobs"] == pytest.approx(naive_windows(tiny_folder, tokenizer.encode(LONG)), abs=1e-4)
    total = sum(row["logprob"] for row in rows)
    assert f"{total:.4f}" in result.stderr
    assert f"{math.exp(-total / sum(row['tokens'] for row in rows)):.4f}" in result.stderr


def naive_windows(folder: Path, tokens: list[int]) -> list[float]:
    """Each window by one pass of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole, found = torch.tensor([1, *tokens]), []
    for window in rolling_windows(len(whole), 1, 40, 10):
        with torch.no_grad():
            logp = model(whole[None, window.begin : window.end - 1]).logits[0].log_softmax(-1)
        targets = whole[window.start : window.end, None]
        found += logp[window.start - 1 - window.begin :].gather(1, targets)[:, 0].tolist()
    return found


def test_what_cannot_be_scored_is_refused_in_a_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    long, bad, out = tmp_path / "long.jsonl", tmp_path / "bad.jsonl", tmp_path / "scores.jsonl"
    out.write_text("of another day")
    long.write_text(json.dumps({"text": "1"}) + "\n" + json.dumps({"text": "1" * 300}))
    bad.write_text('{"text": "a"}\n{"text": ')
    model = ("--model", str(tiny_folder), "--out", str(out))
    for given, words in (
        ((str(bad), "--model", "nothing"), "line 2 is not valid JSON"),
        ((str(long), *model), "line 2 has 301 tokens with its context, and the model reads 256"),
        ((str(long), *model), "in windows with --window 256"),
        ((str(long), *model, "--window", "300"), "--window 300 with --stride 150 does not fit"),
        ((str(long), *model, "--stride", "2"), "give --window, too"),
        ((str(long), *model, "--layout", "tensor=4"), "tensor=4"),
        ((str(long), *model, "--numerics", "exactly"), "--numerics 'exactly' is not supported"),
        ((str(tmp_path / "none.jsonl"), *model), "none.jsonl"),
    ):
        assert words in refused("score", *given)
    assert out.read_text() == "of another day"


@pytest.mark.exhaustive
def test_the_commands_of_its_page_run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/serving.md").read_text().splitlines()
    commands = [shlex.split(line, comments=True)[2:] for line in page if line.startswith("    lockstep score ")]
    assert len(commands) >= 3
    Path("texts.jsonl").write_text("\n".join(json.dumps(line) for line in LINES[1:]))
    Path("book.txt").write_text(LONG)
    for words in commands:
        result = score(*(str(tiny_folder) if word == "runs/quickstart" else word for word in words))
        assert result.exit_code == 0, result.output


@pytest.mark.exhaustive
def test_rows_that_were_written_stay_whole_when_it_is_interrupted_or_nobody_reads_on(
    tiny_folder: Path, tmp_path: Path
) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    texts.write_text("".join(json.dumps({"id": i, "text": f"{i} {LONG[:200]}"}) + "\n" for i in range(20_000)))
    given = ["score", str(texts), "--model", str(tiny_folder), "--dtype", "float32"]
    command = Command(tmp_path / "log", *given, "--out", str(out))
    try:
        command.wait_for_file(out)
        command.interrupt()
        assert (command.wait(), command.output) == (130, "interrupted\n")
    finally:
        command.kill()
    rows = out.read_text()
    assert rows.endswith("\n")
    assert [json.loads(line)["id"] for line in rows.splitlines()] == list(range(rows.count("\n")))
    pipeline = f"{shlex.join([sys.executable, '-m', 'lockstep', *given])} | head -n 1"
    found = subprocess.run(["bash", "-c", pipeline], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines(keepends=True) == rows.splitlines(keepends=True)[:1]
    assert found.stderr == ""


@pytest.mark.exhaustive
def test_a_damaged_model_has_no_perplexity(tiny_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.model.norm.weight.data[0] = float("nan")
    damaged = shutil.copytree(tiny_folder, tmp_path / "damaged")
    model.save_pretrained(damaged)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "1"}\n')
    assert "line 1 has log-probabilities that are not finite" in refused("score", str(texts), "--model", str(damaged))
