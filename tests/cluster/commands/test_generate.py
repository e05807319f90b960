"""`lockstep generate` for a person: one answer, files of prompts, and talks."""

import json
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lockstep.cluster.cli import app
from lockstep.cluster.generation import Answerer, Question, conversation, read_questions, talk
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import Groups
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder, read_text_files
from lockstep.model.loading import build, transformer_of
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from tests.cluster.cli_process import lockstep, refused

OPTIONS = ("--dtype", "float32", "--max-new-tokens", "8", "--temperature", "0.9", "--seed", "4")


@pytest.fixture
def answerer(tiny_folder: Path, groups: Groups) -> Answerer:
    source, tokenizer = HuggingFaceFolder(tiny_folder), Tokenizer(read_text_files(tiny_folder))
    transformer = transformer_of(build(source.config, groups, torch.float32, source))
    sampling = SamplingParams(max_new_tokens=20, logit_bias={2: -100.0})
    return Answerer(RolloutEngine(transformer, decode=tokenizer.decode), tokenizer, sampling, seed=3)


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_is_answered_in_its_order(tiny_folder: Path, tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    asked = [{"prompt": "12 +", "id": 7}, {"messages": [{"role": "user", "content": "34 ="}]}]
    prompts.write_text("\n".join(["the final answer", *map(json.dumps, asked), "", "{é}"[1:]]) + "\n")
    result = lockstep("generate", str(tiny_folder), "--input", str(prompts), "--output", str(answers), *OPTIONS)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    rows = rows_of(answers.read_text())
    assert [{k: v for k, v in row.items() if k != "completions"} for row in rows] == [
        {"prompt": "the final answer"},
        *asked,
        {"prompt": "é}"},
    ]
    assert all(len(row["completions"]) == 1 for row in rows)
    alone = lockstep("generate", str(tiny_folder), "the final answer", *OPTIONS)
    assert alone.stdout == rows[0]["completions"][0]["text"] + "\n"


def test_what_is_longer_than_the_context_is_refused_cut_or_rolls(tiny_folder: Path) -> None:
    long = ["generate", str(tiny_folder), "12 + 34 =", "--raw", *OPTIONS, "--max-new-tokens", "260"]
    assert "need a context of" in refused(*long)
    assert "leave no room for a prompt in a context of 256" in refused(*long, "--on-overflow", "truncate")
    rolled = lockstep(*long, "--on-overflow", "roll", "--logit-bias", "2=-100")
    assert rolled.exit_code == 0, rolled.output


def test_stdin_gives_samples_of_each_prompt(tiny_folder: Path) -> None:
    many = ["generate", str(tiny_folder), "--input", "-", "--samples", "3", "--raw", *OPTIONS]
    result = CliRunner().invoke(app, many, input="12 + 34 =\n1 + 1 =\n")
    rows = rows_of(result.stdout)
    assert [row["prompt"] for row in rows] == ["12 + 34 =", "1 + 1 ="]
    texts = [completion["text"] for row in rows for completion in row["completions"]]
    assert len(set(texts)) == 6
    first = lockstep("generate", str(tiny_folder), "12 + 34 =", "--raw", *OPTIONS)
    assert first.stdout == texts[0] + "\n"


def test_what_does_not_fit_together_is_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    folder = str(tiny_folder)
    assert "comes from one place" in refused("generate", folder)
    assert "comes from one place" in refused("generate", folder, "hello", "--chat")
    assert "leave out --raw" in refused("generate", folder, "--chat", "--raw")
    assert "No such file" in refused("generate", folder, "--input", str(tmp_path / "missing"))
    assert "--logit-bias 17=-2.5" in refused("generate", folder, "hello", "--logit-bias", "17")
    assert "--min-p 2.0 is not allowed" in refused("generate", folder, "hello", "--min-p", "2")
    for line, words in (
        ("{", "line 2 begins like a JSON object and is none"),
        ('{"text": "x"}', "line 2 has neither"),
        ('{"messages": []}', "line 2: messages are a list"),
        ('{"messages": [{"role": "x", "content": "y"}]}', "line 2: messages are a list"),
    ):
        bad.write_text(f"fine\n{line}\n")
        assert words in refused("generate", folder, "--input", str(bad))


def test_questions_are_texts_or_objects() -> None:
    lines = ["a", "", '{"prompt": "b", "n": 1}', '{"messages": [{"role": "user", "content": "c", "x": 0}]}']
    found = read_questions(lines, raw=False, system="s")
    assert [q.messages for q in found] == [
        conversation("a", "s"),
        conversation("b", "s"),
        ({"role": "user", "content": "c"},),
    ]
    assert [(q.text, q.messages) for q in read_questions(lines[:1], raw=True, system=None)] == [("a", ())]


def run_talk(answerer: Answerer, said: Iterable[str], interrupt_at: int | None = None) -> tuple[list[str], list[str]]:
    """Pieces and notes of a talk; Ctrl-C comes with one of the pieces."""
    pieces: list[str] = []
    notes: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == interrupt_at:
            signal.raise_signal(signal.SIGINT)

    words = iter([*said])

    def read() -> str:
        try:
            return next(words)
        except StopIteration:
            raise EOFError from None

    talk(answerer, read, write, notes.append, system="final")
    return pieces, notes


def test_a_talk_goes_on_from_all_that_was_said(answerer: Answerer) -> None:
    pieces, notes = run_talk(answerer, ["12 + 34 =", " ", "State"])
    assert notes == []
    assert answerer.engine.statistics.cached_prompt_tokens > 0
    first = "".join(answerer.stream(answerer.tokens(Question({}, conversation("12 + 34 =", "final"))), 2))
    history = [*conversation("12 + 34 =", "final"), {"role": "assistant", "content": first}]
    asked = Question({}, messages=(*history, {"role": "user", "content": "State"}))
    second = "".join(answerer.stream(answerer.tokens(asked), 4))
    assert "".join(pieces) == f"{first}\n{second}\n"


def test_ctrl_c_ends_an_answer_and_not_the_talk(answerer: Answerer) -> None:
    before = signal.getsignal(signal.SIGINT)
    whole, _ = run_talk(answerer, ["12 + 34 ="])
    cut, _ = run_talk(answerer, ["12 + 34 =", "State"], interrupt_at=3)
    assert cut[:3] == whole[:3]
    assert cut[3] == "\n"
    assert len(cut) > 5
    assert signal.getsignal(signal.SIGINT) is before
    assert not answerer.engine.has_work
    assert answerer.engine.statistics.blocks_used == 0


def test_a_turn_without_room_is_said_and_forgotten(answerer: Answerer) -> None:
    pieces, notes = run_talk(answerer, ["ab " * 200, "12"])
    assert len(notes) == 1
    assert "256 are allowed" in notes[0]
    assert pieces[:-1] == [*answerer.stream(answerer.tokens(Question({}, conversation("12", "final"))), 2)]
