"""What the package says of its arguments, a command says of its flags."""

from typing import Annotated

import pytest
import typer

from lockstep.cluster.commands.console import flags_of, with_flags
from lockstep.cluster.commands.options import Overrides, overriding
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import parse


def command(
    source: Annotated[str, typer.Argument(help="Where from.")],
    max_memory: Annotated[str, typer.Option(help="At most.")] = "8GB",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    overrides: Overrides = None,
    end: Annotated[str | None, typer.Option("-e", "--end")] = None,
) -> None:
    """A command."""


def test_options_have_flags_and_arguments_have_none() -> None:
    assert flags_of(command) == {
        "max_memory": "--max-memory", "as_json": "--json", "overrides": "--set", "end": "--end"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("max_memory=10 MB is too little: give 75 MB", "--max-memory 10 MB is too little: give 75 MB"),
        ("it was begun with end=None, and now it is x", "it was begun with --end None, and now it is x"),
        ("source=a and rl.end=3 and weekend=4 are none", "source=a and rl.end=3 and weekend=4 are none"),
        ("'end=3' was given, and end = 4", "'end=3' was given, and end = 4"),
    ],
)
def test_arguments_become_flags_and_keys_of_recipes_do_not(sentence: str, said: str) -> None:
    assert with_flags(sentence, flags_of(command)) == said
    assert with_flags(sentence, {}) == sentence


def test_an_override_is_named_with_its_flag_by_commands_alone() -> None:
    with pytest.raises(
        RecipeError, match=r"^'seed' is not of the form section\.key=value, for example rl\.group_size=8$"
    ):
        parse({}, ["seed"])
    with pytest.raises(RecipeError, match=r"^--set 'seed' is not of the form"), overriding():
        parse({}, ["seed"])
