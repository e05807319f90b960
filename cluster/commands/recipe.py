"""The commands `lockstep recipe list`, `show`, `keys`, `check` and `diff`."""

from functools import partial
from typing import Annotated

import typer

from lockstep.cluster.commands.console import err, out, sentences
from lockstep.cluster.commands.options import Overrides, RecipeName, check_choice, complete_key, overriding

app = typer.Typer(no_args_is_help=True, help="What recipes say, and what they may say.")


@app.command("list")
@sentences
def list_recipes() -> None:
    """List the recipes that ship with the package; other commands take their names.

    Example: lockstep recipe list
    """
    from lockstep.cluster.recipe.catalog import shipped_recipes, title

    recipes = shipped_recipes()
    width = max(map(len, recipes))
    for name, path in recipes.items():
        print(f"{name:<{width}}  {title(path)}")


@app.command()
@sentences
def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe as TOML with every default, what it extends and what is overridden.

    Example: lockstep recipe show quickstart --set rl.group_size=16
    """
    from lockstep.cluster.recipe.load import load_recipe, to_toml

    with overriding():
        resolved = load_recipe(recipe, overrides or [])
    print(to_toml(resolved), end="")


@app.command()
@sentences
def keys(
    prefix: Annotated[str, typer.Argument(help="Only keys that begin so, as rl.optimizer.", show_default=False)] = "",
    style: Annotated[str, typer.Option("--format", help="text, or markdown for the page of all keys.")] = "text",
) -> None:
    """List keys of recipes with defaults, types, bounds or choices, and what they mean.

    Example: lockstep recipe keys rl.optimizer
    """
    from lockstep.cluster.recipe.reference import markdown, sections_below

    check_choice("--format", style, ("text", "markdown"))
    if style == "markdown" and prefix:
        raise ValueError("--format markdown is a page of all keys: leave out the prefix")
    if style == "markdown":
        print(markdown(), end="")
        return
    for section in sections_below(prefix):
        if section.name:
            print(f"{section.heading}\n    {section.description}")
        print(*section.keys, "", sep="\n")


@app.command()
@partial(sentences, refused=1)
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Of a run that goes on from its last checkpoint.")] = False,
) -> None:
    """Check all that a run can be refused for before its first step, without a cluster; exit code 1 if it would be.

    Example: lockstep recipe check quickstart --set layout.tensor=3
    """
    from lockstep.cluster.recipe.load import load_recipe
    from lockstep.cluster.run.dry_run import dry_run

    with overriding():
        resolved = load_recipe(recipe, overrides or [])
    out.print(f"{recipe} can run {dry_run(resolved, err.print, resume=resume)}", highlight=False)


@app.command()
@sentences
def diff(
    first: RecipeName,
    second: RecipeName,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key of the second recipe.", autocompletion=complete_key),
    ] = None,
) -> None:
    """List the keys whose values differ, as they are when all defaults and overrides are in.

    Example: lockstep recipe diff quickstart grpo-gsm8k-smollm2
    """
    from lockstep.cluster.recipe.changes import changes
    from lockstep.cluster.recipe.load import load_recipe

    with overriding():
        before, now = load_recipe(first), load_recipe(second, overrides or [])
    for change in changes(before, now):
        print(change)
