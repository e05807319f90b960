"""A recipe stands on top of those that it extends, and is found by its path or, where it ships, by its name."""

import itertools
from pathlib import Path

import pytest

from lockstep.cluster.recipe.catalog import SHIPPED, shipped_recipes, title
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import load_recipe
from lockstep.cluster.recipe.reader import DEEPEST, merged, read_recipe

ROOT = Path(__file__).parents[3]


def write(folder: Path, **recipes: str) -> Path:
    """Recipes by name; the last one's path."""
    folder.mkdir(exist_ok=True)
    for name, text in recipes.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / f"{list(recipes)[-1]}.toml"


def refusal(recipe: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tables_are_merged_and_all_else_is_replaced(tmp_path: Path) -> None:
    base = '[task]\nstop = ["a", "b"]\nsettings = { low = 1, high = 2 }\n[rl]\nsteps = 5\nsampling = { stop = ["x"] }\n'
    mine = 'extends = "base.toml"\n[task]\nstop = ["c"]\nsettings = { high = 3 }\n[rl]\ngroup_size = 4\n'
    recipe = load_recipe(write(tmp_path, base=base, mine=mine))
    assert recipe.task.stop == ["c"]
    assert recipe.task.settings == {"low": 1, "high": 3}
    assert recipe.rl is not None
    assert (recipe.rl.steps, recipe.rl.group_size, recipe.rl.sampling.stop) == (5, 4, ("x",))


def test_overrides_stand_on_top(tmp_path: Path) -> None:
    path = write(tmp_path, base="seed = 1\n", mine='extends = "base.toml"\nseed = 2\n')
    assert load_recipe(path).seed == 2
    assert load_recipe(path, ["seed=3"]).seed == 3


def test_a_table_takes_the_place_of_a_value_and_a_value_that_of_a_table() -> None:
    assert merged({"a": 1, "b": {"c": 2}}, {"a": {"d": 3}, "b": 4}) == {"a": {"d": 3}, "b": 4}


def test_of_several_the_later_one_stands_on_top(tmp_path: Path) -> None:
    first, second = 'name = "first"\nseed = 1\n', 'name = "second"\n'
    mine = 'extends = ["first.toml", "second.toml"]\n'
    recipe = load_recipe(write(tmp_path, first=first, second=second, mine=mine))
    assert (recipe.name, recipe.seed) == ("second", 1)


def test_two_may_extend_the_same_one(tmp_path: Path) -> None:
    left, right = ('extends = "base.toml"\nname = "left"\n', 'extends = "base.toml"\n')
    path = write(tmp_path, base="seed = 7\n", left=left, right=right, mine='extends = ["left.toml", "right.toml"]\n')
    assert (load_recipe(path).name, load_recipe(path).seed) == ("left", 7)


def test_paths_of_a_recipe_that_is_extended_are_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, here = tmp_path / "shared", tmp_path / "here"
    (shared / "judge").mkdir(parents=True)
    base = (
        'run = "runs/{name}"\ncheckpoints = { at = "s3://bucket/{name}" }\nmodel = { source = "judge" }\n'
        'task = { generator = "chain_sum", held_out_from = "../test.jsonl" }\nroles.teacher = { source = "gone" }\n'
        '[pretrain]\nsteps = 1\ndata = { blend = [{ path = "tokens" }] }\n'
    )
    write(shared, base=base)
    path = write(here, mine='extends = "../shared/base.toml"\nname = "mine"\nmodel = { tokenizer = "../tokens" }\n')
    monkeypatch.chdir(here)
    recipe = load_recipe(path)
    assert recipe.run == f"{shared}/runs/mine"
    assert recipe.checkpoints.at == "s3://bucket/{name}"
    assert recipe.model.source == f"{shared}/judge"
    assert recipe.model.tokenizer == f"{tmp_path}/tokens"
    assert (recipe.task.generator, recipe.task.held_out_from) == ("chain_sum", f"{tmp_path}/test.jsonl")
    assert recipe.roles.teacher.source == "gone"
    assert recipe.pretrain is not None
    assert recipe.pretrain.data is not None
    assert recipe.pretrain.data.blend[0].path == f"{shared}/tokens"


def test_what_is_wrong_in_a_recipe_that_is_extended_is_said_of_its_key(tmp_path: Path) -> None:
    wrong = "[model]\nsource = 3\n[pretrain]\ndata = { blend = 4 }\n"
    assert "model.source=3" in refusal(write(tmp_path, base=wrong, mine='extends = "base.toml"\n'))


def test_a_circle_is_refused(tmp_path: Path) -> None:
    alone = write(tmp_path, alone='extends = "alone.toml"\n')
    assert f"in a circle, {alone} → {alone}:" in refusal(alone)
    two = write(tmp_path, one='extends = "two.toml"\n', two='extends = "one.toml"\n')
    assert f"{two} → {tmp_path}/one.toml → {two}" in refusal(two)


def test_a_tower_is_refused_where_it_is_too_high(tmp_path: Path) -> None:
    names = [f"r{number}" for number in range(DEEPEST + 1)]
    recipes = {name: f'extends = "{below}.toml"\n' for below, name in itertools.pairwise(names)}
    top = write(tmp_path, r0="seed = 5\n", **recipes)
    assert f"more than {DEEPEST} recipes" in refusal(top)
    assert load_recipe(tmp_path / f"{names[-2]}.toml").seed == 5


@pytest.mark.parametrize(
    ("extends", "words"),
    [
        ('"gone.toml"', "extends gone.toml, and there is none: give a path from its folder"),
        ('"nobody"', "name of one that ships with the package: alignment"),
        ("3", "says extends=3: give the path of a recipe"),
        ('["base.toml", 3]', "says extends=['base.toml', 3]"),
        ('""', "says extends=''"),
        ('"broken.toml"', "broken.toml is not valid TOML"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, extends: str, words: str) -> None:
    path = write(tmp_path, base="", broken="name = [", mine=f"extends = {extends}\n")
    assert words in refusal(path)


def test_recipes_that_ship_are_those_of_the_repository() -> None:
    assert {path.resolve() for path in shipped_recipes().values()} == set((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_that_ships_has_a_title_and_is_found_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert 10 < len(title(shipped_recipes()[name])) < 100
    assert load_recipe(name) == load_recipe(SHIPPED / f"{name}.toml")
    assert load_recipe(name).folder.is_relative_to(tmp_path)


def test_a_file_goes_before_a_recipe_that_ships_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert load_recipe("quickstart").name == "quickstart"
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text('name = "mine"\n')
    assert load_recipe("quickstart").name == "mine"


def test_a_recipe_that_ships_is_extended_by_its_name_and_its_paths_are_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "mine", mine='extends = "pretrain-10m"\nname = "mine"\n')
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    assert recipe.pretrain is not None
    assert recipe.pretrain.data is not None
    assert recipe.pretrain.data.blend[0].path == f"{tmp_path}/tokens/corpus"
    assert recipe.folder == tmp_path / "runs" / "mine"


def test_only_a_bare_name_is_that_of_a_recipe_that_ships() -> None:
    for given in ("x/quickstart", "./quickstart", "quickstart.toml", "nobody"):
        with pytest.raises(RecipeError, match=r"one that ships with the package: alignment, .*, quickstart, .*$"):
            read_recipe(given)
