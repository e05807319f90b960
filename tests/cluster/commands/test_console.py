"""What the package says of its arguments, a command says of its flags."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner

from lockstep.cluster.commands.console import flags_of, json_lines, out, sentences, with_flags
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


def for_users() -> None:
    parse({}, ["seed"])


def for_users_of_a_file() -> None:
    Path("[bold]:smile:[/bold]").read_text()


def elsewhere() -> None:
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        pool.submit(parse, {}, ["seed"]).result()


def by_function() -> None:
    int("twelve")


def in_a_library() -> None:
    json.loads("{")


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (for_users, 2, "'seed' is not of the form"),
        (for_users_of_a_file, 2, "'[bold]:smile:[/bold]'\n"),
        (elsewhere, 2, "'seed' is not of the form"),
        (by_function, 1, "(unexpected ValueError in test_console.py, line "),
        (in_a_library, 1, "(unexpected JSONDecodeError in decoder.py, line "),
    ],
)
def test_errors_that_nobody_wrote_for_users_say_where_they_come_from(
    body: Callable[[], None], code: int, words: str
) -> None:
    app = typer.Typer()
    app.command()(sentences(body))
    result = CliRunner().invoke(app, [])
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.output
    assert words in result.stderr
    assert ("--debug" in result.stderr) == (code == 1)
    traced = CliRunner().invoke(app, ["--debug"])
    assert traced.exit_code == code
    assert "Traceback (most recent call last)" in traced.stderr
    assert f"in {body.__name__}\n" in traced.stderr
    assert traced.stderr.endswith(result.stderr)


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    name = "[red]run[/red] [/] :smile: [link=x]"
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    with out.capture() as printed:
        out.print(name)
        out.print(table)
    assert printed.get().count(name) == 5


def test_rows_are_whole_lines_also_where_a_text_is_no_unicode(tmp_path: Path) -> None:
    rows = [{"id": "naïve 🦊"}, {"id": "\ud83d alone"}, {"id": "a\nb"}]
    with json_lines(tmp_path / "rows.jsonl") as write:
        for row in rows:
            write(row)
            written = (tmp_path / "rows.jsonl").read_text()
            assert written.endswith("}\n")
    assert [json.loads(line) for line in written.splitlines()] == rows
    assert "naïve 🦊" in written


def test_rows_that_nobody_reads_end_a_command_without_a_word() -> None:
    read, write_end = os.pipe()
    with json_lines(Path(f"/proc/self/fd/{write_end}")) as write:
        write({"index": 0})
        os.close(read)
        with pytest.raises(typer.Exit) as ended:
            write({"index": 1})
    assert ended.value.exit_code == 1
    os.close(write_end)
