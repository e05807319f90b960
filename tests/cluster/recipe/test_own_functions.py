"""The functions that the pages show can be given to a recipe, by the commands that the README shows."""

import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import pytest

from lockstep.cluster.recipe.load import parse
from tests.cluster.cli_process import lockstep
from tests.rl.verifiers.llm_judge.scripted_endpoint import says, scripted

ROOT = Path(__file__).parents[3]


def shown(page: str, function: str) -> str:
    """The source of a function that a page shows."""
    found = re.search(
        rf"^( +)def {function}\(.*?(?=\n\n(?!\1)|\n(?!\1|\n))", (ROOT / page).read_text(), re.DOTALL | re.M
    )
    assert found, f"{page} shows no {function}"
    return textwrap.dedent(found[0])


def test_the_pages_functions_and_the_readmes_commands_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(shown("docs/rl.md", "brevity"))
    Path("problems.py").write_text(f"from random import Random\n{shown('docs/tasks.md', 'sums')}")
    command = next(line for line in (ROOT / "README.md").read_text().splitlines() if "rewards.py:brevity" in line)
    words = shlex.split(command)
    assert words[:3] == ["lockstep", "train", "quickstart"]
    given = ["--set", f"model.source={tiny_folder}", "--set", "task.generator=problems.py:sums"]
    given += ["--set", "task.settings={count = 4000}", "--set", "rollout.length=200"]
    Path("curricula.py").write_text(shown("docs/tasks.md", "short_first"))
    given += ["--set", "task.curriculum=curricula.py:short_first"]
    result = lockstep("recipe", "check", *words[2:], *given)
    assert result.exit_code == 0, result.output
    Path("nothing.py").write_text("def never(step): return 0\n")
    refused = lockstep("recipe", "check", *words[2:], *given, "--set", "task.curriculum=nothing.py:never")
    assert "the curriculum gives every problem the weight 0 in step 1" in refused.output
    Path("rewards.py").write_text("def brevity(length): ...\n")
    refused = lockstep("recipe", "check", *words[2:], *given)
    assert refused.exit_code == 1
    assert "rewards.py:brevity takes length, and is called with completion, answer, prompt" in refused.output


def test_the_pages_llm_judge_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/rl.md").read_text()
    shown = re.search(r"^    \[verifier\.llm_judge\]\n.*?weight = \S+", page, re.DOTALL | re.M)
    assert shown
    recipe = parse(tomllib.loads(textwrap.dedent(shown[0])))
    assert recipe.verifier.llm_judge is not None
    assert recipe.verifier.llm_judge.budget == 20000
    assert recipe.reward.user_functions == {"llm_judge": "llm_judge"}
    command = re.search(r"^    (lockstep train quickstart --set verifier\.llm_judge.*?)\n\n", page, re.DOTALL | re.M)
    assert command
    with scripted(says("SCORE: 9")) as server:
        words = shlex.split(command[1].replace("\\\n", " ").replace("http://127.0.0.1:8000/v1", server.url))
        given = ["--set", f"model.source={tiny_folder}", "--set", "rollout.length=200"]
        given += ["--set", "task.train=32", "--set", "task.held_out=8"]
        result = lockstep("recipe", "check", *words[2:], *given)
    assert result.exit_code == 0, result.output
    assert "gave 9, from 0 to 10, to a right answer of 2 + 2" in result.stderr
