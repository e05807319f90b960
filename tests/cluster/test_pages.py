"""Commands of the pages on clusters run, in their order; sentences that they quote are in the code."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cli_process import Command, lockstep, overrides
from tests.cluster.heads import Head

ROOT = Path(__file__).parents[2]
PAGES = ("clusters", "run-folder", "troubleshooting")
TOOL = """#!/bin/sh
echo "$0 $@" | sed "s|.*/||" >> {log}
for word in "$@"; do case "$word" in job.*|compose.yaml) test -s "$word" || exit 3 ;; esac; done
"""
TOOLS = ("sbatch", "scancel", "kubectl", "docker", "ray")
"""Programs of others, whose words are looked at and not what they do."""
STARTS = ("train", "submit", "jobs", "logs", "attach", "stop", "resume", "report")
"""Commands that need a cluster or a run; `test_commands_that_train_do` runs them."""


def commands(page: str) -> list[list[str]]:
    """The words of the indented commands of a page."""
    lines = (ROOT / "docs" / f"{page}.md").read_text().splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    ") and line.strip()]


def strings() -> Iterator[str]:
    """All strings of the code, with … for what is put into them, and the script of Slurm jobs."""
    for room in ("cluster", "rl", "model", "data", "distributed"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
    yield (ROOT / "cluster/render/slurm.sh").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_commands_run_as_they_are_written(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).write_text(TOOL.format(log=tmp_path / "log"))
        (tmp_path / "bin" / tool).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    for words in commands(page):
        if words[0] != "lockstep":
            assert words[0] in TOOLS
            subprocess.run(words, env=os.environ | {"PATH": path}, check=True)
            continue
        checked = [*words[1:], "--help"] if words[1] in STARTS else words[1:]
        result = lockstep(*checked)
        assert result.exit_code == 0, (words, result.output)


def test_flags_of_ray_are_its_own() -> None:
    known = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"], capture_output=True, text=True
    )
    asked = [word for words in commands("clusters") if words[0] == "ray" for word in words if word.startswith("--")]
    assert asked
    assert not [word for word in asked if word.split("=")[0] not in known.stdout]


@pytest.mark.exhaustive
def test_commands_that_train_do(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"10.0.0.1:6379": head.cluster, "http://10.0.0.1:8265": head.address, "quickstart": "parity-tiny"}
    ran = [words for page in PAGES for words in commands(page) if words[:1] == ["lockstep"] and words[1] in STARTS]
    assert {words[1] for words in ran} == set(STARTS)
    for words in sorted(ran, key=lambda words: STARTS.index(words[1])):
        arguments = [places.get(word, word.replace("quickstart", "parity-tiny")) for word in words[1:]]
        short = overrides("pretrain.steps=2") if words[1] in ("train", "submit") else []
        command = Command(tmp_path / "log", *arguments, *short, HF_TOKEN="hf_of_nobody")
        try:
            assert command.wait(200) == 0, command.output
        finally:
            command.kill()


def test_sentences_are_in_the_code() -> None:
    quoted = re.findall(r"^> (.+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 25
    known = list(strings())

    def is_known(sentence: str) -> bool:
        said = re.sub(r"--([\w-]+) ", r"\1=", sentence)  # the command line puts flags in the place of arguments
        parts = [re.escape(part.strip()) for part in said.split("…") if part.strip()]
        pattern = re.compile("[^\n]*?".join(parts))
        return any(pattern.search(text) for text in known)

    assert not [sentence for sentence in quoted if not is_known(sentence)]
