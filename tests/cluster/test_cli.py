"""Every command does what its help says, and every mistake of the user ends with one sentence and exit code 2."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lockstep import __version__
from tests.cluster.cli_process import Command, lockstep, refused, write_recipe

COMMANDS = ("train", "generate", "serve", "eval", "grade", "score", "convert", "verify", "inspect", "report", "submit")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_on_a_line_of_its_own(command: str) -> None:
    result = lockstep(command, "--help")
    assert result.exit_code == 0
    lines = [line.strip() for line in result.output.splitlines()]
    place = next(i for i, line in enumerate(lines) if line.startswith(f"Example: lockstep {command} "))
    assert lines[place - 1] == lines[place + 1] == ""


def test_the_version_is_that_of_the_package() -> None:
    result = lockstep("--version")
    assert (result.exit_code, result.stdout) == (0, f"lockstep {__version__}\n")


def test_a_bad_recipe_is_refused_and_nothing_is_written(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = str(write_recipe(tmp_path, tiny_folder))
    before = sorted(tmp_path.rglob("*"))
    for override, words in (
        ("rl.group_sise=8", "the nearest is rl.group_size"),
        ("layout.tensor=3", "layout.tensor=3 does not divide"),
        ("layout.pipeline=9", "layout.pipeline=9"),
        ("task.generator=nothing.jsonl", "there is no such file"),
        ("task.generator=chain_sums", "chain_sums"),
        (f"model.source={tmp_path}", "holds no checkpoint"),
    ):
        assert words in refused("train", recipe, "--set", override)
    assert "there is no recipe" in refused("train", str(tmp_path / "missing.toml"))
    assert sorted(tmp_path.rglob("*")) == before


def test_generate_answers_with_every_option(tiny_folder: Path) -> None:
    options = ["--temperature", "0.7", "--top-k", "9", "--top-p", "0.9", "--max-new-tokens", "8", "--seed", "3"]
    first, again = (
        lockstep("generate", str(tiny_folder), "12 + 34 =", *options, "--dtype", "float32") for _ in range(2)
    )
    assert first.exit_code == 0, first.output
    assert len(first.stdout) > 1
    assert first.stdout == again.stdout
    stop = next(character for character in reversed(first.stdout) if character.isalnum())
    stopped = lockstep("generate", str(tiny_folder), "12 + 34 =", *options, "--dtype", "float32", "--stop", stop)
    assert stopped.stdout == first.stdout[: first.stdout.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--temperature", "-1", "--temperature"),
        ("--temperature", "nan", "temperature"),
        ("--temperature", "hot", "--temperature"),
        ("--top-p", "0", "--top-p 0.0 is not allowed"),
        ("--top-p", "2", "--top-p 2.0 is not allowed"),
        ("--max-new-tokens", "0", "--max-new-tokens"),
        ("--max-new-tokens", "100000", "context"),
        ("--dtype", "float16", "use bfloat16 or float32"),
    ],
)
def test_a_bad_option_is_refused(tiny_folder: Path, option: str, value: str, words: str) -> None:
    result = lockstep("generate", str(tiny_folder), "hello", option, value)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "pydantic" not in result.stderr


def test_eval_prints_accuracy_with_its_interval(tiny_folder: Path, tmp_path: Path) -> None:
    recipe, folder = str(write_recipe(tmp_path, tiny_folder)), tmp_path / "eval"
    short = ["--dtype", "float32", "--max-new-tokens", "4"]
    result = lockstep("eval", str(tiny_folder), "--task", recipe, "--output", str(folder), *short)
    assert result.exit_code == 0, result.output
    assert "of 4 correct" in result.stdout
    assert "95% interval" in result.stdout
    assert len((folder / "completions.jsonl").read_text().splitlines()) == 4
    assert "chain_sums" in refused("eval", str(tiny_folder), "--task", "chain_sums")


def test_a_model_converts_there_and_back_unchanged(tiny_folder: Path, tmp_path: Path) -> None:
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    assert lockstep("convert", str(tiny_folder), ours).exit_code == 0
    assert lockstep("convert", ours, theirs, "--to", "hf").exit_code == 0
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (tiny_folder, theirs))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert (Path(theirs) / "tokenizer.json").read_text() == (tiny_folder / "tokenizer.json").read_text()
    assert "exists" in refused("convert", str(tiny_folder), ours)
    assert "exists" in refused("convert", str(tiny_folder), theirs, "--to", "hf")
    assert "use lockstep, hf, peft, megatron or deepspeed" in refused(
        "convert", str(tiny_folder), str(tmp_path / "x"), "--to", "onnx"
    )
    words = refused("convert", str(tiny_folder), str(tmp_path / "x"), "--dtype", "int8")
    assert "use float32, bfloat16 or float16" in words


def test_an_unknown_model_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "neither a folder nor a .gguf file" in refused("convert", "no/such", str(tmp_path / "x"))
    assert "neither a folder nor a .gguf file" in refused("generate", "a/b/c/d", "hello")
    assert "there is no file" in refused("generate", str(tmp_path / "missing.gguf"), "hello")
    assert not (tmp_path / "x").exists()


def test_a_report_of_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    assert "holds no summary.json" in refused("report", str(tmp_path))
    assert "is not a folder" in refused("report", str(tmp_path / "missing"))


def test_the_command_prints_the_answer_and_no_warnings(tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--max-new-tokens", "4", "--dtype", "float32"]
    command = Command(tmp_path / "log", "generate", str(tiny_folder), "12 + 34 =", *options)
    assert command.wait() == 0, command.output
    assert "Warning" not in command.output
    assert "WARNING" not in command.output
    assert command.output == lockstep("generate", str(tiny_folder), "12 + 34 =", *options).stdout
