"""`lockstep recipe` says what recipes say and may say, and whether they can run."""

import tomllib
from pathlib import Path

import pytest

from lockstep.cluster.recipe.load import load_recipe, to_toml
from tests.cluster.cli_process import lockstep, refused, write_recipe

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.mark.parametrize("command", ["list", "show", "keys", "check", "diff"])
def test_help_has_an_example(command: str) -> None:
    result = lockstep("recipe", command, "--help")
    assert result.exit_code == 0
    assert f"Example: lockstep recipe {command}" in result.output


def test_list_has_the_recipes_that_ship() -> None:
    lines = lockstep("recipe", "list").stdout.splitlines()
    assert "quickstart          A released language model learns to add from a verifier, on a laptop" in lines
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in RECIPES.glob("*.toml"))


def test_show_is_a_recipe_with_every_default_and_override(tmp_path: Path) -> None:
    shown = lockstep("recipe", "show", "quickstart", "--set", "rl.group_size=4").stdout
    assert shown == to_toml(load_recipe("quickstart", ["rl.group_size=4"]))
    assert tomllib.loads(shown)["rl"]["group_size"] == 4
    assert tomllib.loads(shown)["layout"]["zero"] == 1
    (tmp_path / "shown.toml").write_text(shown)
    assert load_recipe(tmp_path / "shown.toml") == load_recipe("quickstart", ["rl.group_size=4"])
    assert "--set 'rl.group_size' is not of the form" in refused(
        "recipe", "show", "quickstart", "--set", "rl.group_size"
    )
    assert "nearest is rl.group_size" in refused("recipe", "show", "quickstart", "--set", "rl.group_sise=4")


def test_keys_are_those_below_a_prefix() -> None:
    lines = lockstep("recipe", "keys", "recovery").stdout.splitlines()
    assert lines[:3] == [
        "[recovery]",
        "    What a run does about workers that stop, and about the death of a model's rank",
        "recovery.stopped_after = 60.0",
    ]
    assert lines[3].startswith("    number > 0: seconds after which a worker whose process is stopped")
    assert all(line.startswith((" ", "recovery.", "[recovery]")) for line in lines if line)
    assert lockstep("recipe", "keys").stdout.count("\n    ") > 350
    assert "nearest is evaluation" in refused("recipe", "keys", "evalution")
    assert "use text or markdown" in refused("recipe", "keys", "--format", "html")
    assert "leave out the prefix" in refused("recipe", "keys", "rl", "--format", "markdown")


def test_check_ends_with_1_where_a_run_would_be_refused(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = str(write_recipe(tmp_path, tiny_folder))
    passed = lockstep("recipe", "check", recipe)
    assert (passed.exit_code, passed.stderr) == (0, "")
    assert passed.stdout.startswith(f"{recipe} can run with processes 2 policy")
    for settings, words in (
        (["layout.tensor=5"], "layout.tensor=5 does not divide"),
        (["layout.tensr=1"], "nearest is layout.tensor"),
        (["layout"], "--set 'layout' is not of the form"),
    ):
        result = lockstep("recipe", "check", recipe, "--set", *settings)
        assert (result.exit_code, result.stdout) == (1, "")
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


def test_diff_has_the_keys_that_differ_and_nothing_where_none_does() -> None:
    found = lockstep("recipe", "diff", "grpo-gsm8k-smollm2", "grpo-gsm8k-cluster").stdout.splitlines()
    assert "layout.tensor 1 → 3" in found
    assert {line.split()[0].split(".")[0] for line in found} == {"layout", "rollout", "roles"}
    assert lockstep("recipe", "diff", "quickstart", "quickstart").stdout == ""
    changed = lockstep("recipe", "diff", "quickstart", "quickstart", "--set", "rl.group_size=16")
    assert changed.stdout == "rl.group_size 8 → 16\n"
