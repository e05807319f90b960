"""Options that several commands have, and the checks of their values."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape, glob
from pathlib import Path
from typing import Annotated

import typer


def complete_recipe(incomplete: str) -> list[str]:
    """The recipes that ship, the TOML files and the folders whose names begin so."""
    from lockstep.cluster.recipe.catalog import shipped_recipes

    names = [name for name in shipped_recipes() if name.startswith(incomplete)]
    paths = [path for path in glob(f"{escape(incomplete)}*") if path.endswith(".toml") or Path(path).is_dir()]
    return [*names, *sorted(f"{path}/" if Path(path).is_dir() else path for path in paths)]


def complete_key(incomplete: str) -> list[str]:
    """The keys of recipes whose names begin so, ready for a value."""
    from lockstep.cluster.recipe.keys import dotted_keys
    from lockstep.cluster.recipe.schema import Recipe

    return [f"{key}=" for key in dotted_keys(Recipe) if key.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Argument(
        help="A recipe's file, or the name of one that ships: see recipe list.", autocompletion=complete_recipe
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key, as in --set rl.group_size=8.", autocompletion=complete_key),
]

Profile = Annotated[
    bool, typer.Option("--profile", help="Trace a few steps of each trainer rank into <run>/traces, for Perfetto.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the run's last checkpoint, in this layout, if it saved one.")
]
MaxHours = Annotated[
    float | None,
    typer.Option(min=0.0, help="Save and end within so many hours; the clock starts with the job or its allocation."),
]


@contextmanager
def overriding() -> Iterator[None]:
    """A block that reads a recipe: an override that it refuses is named with its flag.

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    from lockstep.cluster.recipe.errors import RecipeError
    from lockstep.cluster.recipe.load import BadOverride

    try:
        yield
    except BadOverride as error:
        raise RecipeError(f"--set {error}") from error


def check_choice(option: str, given: str | None, known: Iterable[str | None]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        ValueError: names the option, the value and what can be given.
    """
    if given not in known:
        *first, last = (word for word in known if word)
        raise ValueError(f"{option} {given!r} is not supported: use {', '.join(first)} or {last}")


Checkpoint = Annotated[str, typer.Argument(help="A checkpoint, a run, a Hugging Face folder or a .gguf file.")]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.")]
CacheGib = Annotated[float, typer.Option(min=0.001, help="GiB for keys and values, taken as they are needed.")]
Speculate = Annotated[
    int, typer.Option(min=0, max=15, help="Tokens that a pass computes on trial, as they followed in the text before.")
]
