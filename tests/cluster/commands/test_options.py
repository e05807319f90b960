"""A shell completes the names and files of recipes, and the keys that may be overridden."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lockstep.cluster.cli import app


def completed(*words: str) -> list[str]:
    """What bash is offered for the last word."""
    asked = {"_LOCKSTEP_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    result = CliRunner().invoke(app, [], prog_name="lockstep", env=asked)
    assert result.exit_code == 0
    return result.output.split()


@pytest.mark.parametrize("command", [("train",), ("submit",), ("parity",), ("recipe", "show"), ("recipe", "diff", "a")])
def test_recipes_are_completed(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").mkdir()
    for name in ("quick.toml", "quick.txt", "slow.toml", "quick/own.toml"):
        (tmp_path / name).touch()
    assert completed("lockstep", *command, "qu") == ["quickstart", "quick.toml", "quick/"]
    assert completed("lockstep", *command, "quick/") == ["quick/own.toml"]
    assert completed("lockstep", *command, "[") == []


@pytest.mark.parametrize("command", ["train", "submit", "parity", "recipe show", "recipe check", "recipe diff a"])
def test_keys_are_completed(command: str) -> None:
    assert completed("lockstep", *command.split(), "quickstart", "--set", "rl.gr") == ["rl.group_size="]


def test_completion_can_be_installed() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "--install-completion" in shown
    assert "--show-completion" in shown
