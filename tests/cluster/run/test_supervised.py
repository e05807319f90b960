"""A run learns conversations from a file, as docs/sft.md says, and goes on as if it had not been stopped."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.cluster.cli_process import Train, lockstep, metrics, overrides, summary

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "sft.md").read_text()
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^    (lockstep .+)$", PAGE, re.MULTILINE)]
ROWS = re.findall(r"^    (\{.+\})$", PAGE, re.MULTILINE)


def small(folder: Path, model: Path) -> tuple[str, ...]:
    """Settings with which the recipe runs in seconds."""
    return (
        f"model.source={model}",
        "model.dtype=float32",
        f"run={folder}/{{name}}",
        "layout.data=1",
        "task.held_out=2",
        "evaluation.max_new_tokens=4",
        "supervised.longest=0",
        "supervised.held_out=1",
        "supervised.problems_per_step=2",
        "supervised.optimizer={learning_rate=1e-3}",
        "checkpoints.every=2",
    )


def test_commands_of_the_page_read_its_rows(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks.jsonl").write_text("\n".join(ROWS))
    check, train = COMMANDS
    result = lockstep(*check, *overrides(*small(tmp_path, tiny_folder)))
    assert result.exit_code == 0, result.output
    assert re.search(rf"{len(ROWS)} conversations of \d+ tokens, \d+% of which are the assistant's", result.output)
    assert lockstep("recipe", "check", *train[1:], *overrides(*small(tmp_path, tiny_folder))).exit_code == 0


@pytest.mark.exhaustive
def test_a_run_that_goes_on_learns_the_conversations_that_are_left(
    tmp_path: Path, tiny_folder: Path, train: Train
) -> None:
    talks = tmp_path / "talks.jsonl"
    rows = [{"prompt": f"What is {a} + {b}?", "completion": str(a + b)} for a in range(6) for b in range(a)]
    talks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = ROOT / "recipes" / "sft-conversations.toml"
    settings = (*small(tmp_path, tiny_folder), f"supervised.source={talks}", "supervised.evaluate_every=2")

    def run(name: str, steps: int, *options: str) -> Path:
        given = (*settings, f"name={name}", f"supervised.steps={steps}")
        code, output = train(tmp_path / f"{name}.log", recipe, *given, options=options)
        assert code == 0, output
        return tmp_path / name

    whole, parts = run("whole", 6), run("parts", 4)
    assert (parts / "conversations.parquet").is_file()
    run("parts", 6, "--resume")
    expected, found = metrics(whole, "sft"), metrics(parts, "sft")
    assert [line["step"] for line in found if "held_out_loss" in line] == [2, 4, 6]
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    assert found[-1]["held_out_loss"] == expected[-1]["held_out_loss"]
    assert summary(parts)["data"]["supervised.source"] == summary(whole)["data"]["supervised.source"]  # type: ignore[index]
    talks.write_text(talks.read_text().replace("What", "what", 1))
    code, output = train(tmp_path / "log", recipe, *settings, "name=parts", "supervised.steps=8", options=("--resume",))
    assert code == 2
    assert "supervised.source has another content" in output
