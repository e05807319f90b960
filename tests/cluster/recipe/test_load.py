"""A recipe that cannot run is refused in one sentence that says what to change."""

import re
import string
import tomllib
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lockstep.cluster.recipe.catalog import shipped_recipes
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import load_recipe, parse, resolve, to_toml
from lockstep.cluster.recipe.paths import functions, with_absolute_paths
from lockstep.cluster.recipe.schema import Recipe

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.toml"
KEYS = [
    "name",
    "checkpoints",
    "layout",
    "layout.tensor",
    "rollout.length",
    "supervised.optimizer.warmup_steps",
    "rl.group_size",
    "rl.sampling.max_new_tokens",
    "evaluation.max_new_tokens",
]


def refusal(*overrides: str) -> str:
    """The sentence that overrides of an empty recipe are refused with."""
    with pytest.raises(RecipeError) as caught:
        parse({}, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nested(key: str, value: object) -> dict[str, object]:
    """The value under a dotted key."""
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.group_sise=8", ["rl.group_sise", "nearest is rl.group_size"]),
        ("layuot.data=2", ["layuot", "nearest is layout"]),
        ("group_size=8", ["group_size", "nearest is rl.group_size"]),
        ("rl.learning_rate=1", ["rl.learning_rate", "nearest is rl.optimizer.learning_rate"]),
        ("layout.data=two", ['layout.data="two"', "valid integer"]),
        ("layout.data=true", ["layout.data=true", "valid integer"]),
        ("layout.data=2.5", ["layout.data=2.5", "integer"]),
        ("layout=3", ["layout=3", "layout.tensor, layout.sequence, layout.pipeline"]),
        ("rl.group_size=0", ["rl.group_size=0", "greater than or equal to 1"]),
        ("rl.group_size=1", ["group_size=1", "make it 2 or more"]),
        ("rl.advantage=ppo", ['rl.advantage="ppo"', "'grpo', 'dr_grpo', 'rloo'"]),
        ("model.dtype=float16", ['model.dtype="float16"', "'bfloat16' or 'float32'"]),
        ("rl.sampling.top_p=0", ["rl.sampling.top_p=0", "greater than 0"]),
        ("rl.optimizer.learning_rate=inf", ["rl.optimizer.learning_rate", "finite"]),
        ("layout={tensor=256, pipeline=256, data=2}", ["layout=", "tensor=256 × pipeline=256 × data=2 is 131072"]),
        ("rl.group_size", ["'rl.group_size'", "section.key=value"]),
        ("=3", ["'=3'", "section.key=value"]),
        ("rl..steps=3", ["'rl..steps=3'", "section.key=value"]),
    ],
)
def test_what_is_wrong_is_said_with_key_value_and_rule(override: str, words: list[str]) -> None:
    sentence = refusal(override)
    for word in words:
        assert word in sentence


def test_an_override_below_a_value_is_refused() -> None:
    assert "seed is a value, not a section" in refusal("seed=1", "seed.x=2")


def test_numerics_that_a_recipe_would_undo_are_refused() -> None:
    assert "model.numerics='exact'" in refusal("model.numerics=exact", "trainer.compile=true")
    assert "rollout.tensor=1 and layout.tensor=2" in refusal("model.numerics=exact", "layout.tensor=2", "rl.steps=1")
    assert parse({}, ["model.numerics=exact"]).model.numerics == "exact"
    assert "model.numerics" in refusal("model.numerics=precise")


def test_a_missing_a_broken_and_a_binary_recipe_are_named(tmp_path: Path) -> None:
    missing, broken, binary = (tmp_path / name for name in ("missing.toml", "broken.toml", "binary.toml"))
    broken.write_text("name = [\n")
    binary.write_bytes(b"name = '\xff'")
    for path, word in ((missing, "there is no recipe"), (broken, "not valid TOML"), (binary, "not valid TOML")):
        with pytest.raises(RecipeError, match=word) as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_overrides_reach_nested_keys_and_keep_the_others() -> None:
    before = load_recipe(QUICKSTART)
    after = load_recipe(QUICKSTART, ["rl.group_size=4", "task.chat=false", 'rl.sampling.stop=[".", "\\n"]'])
    assert before.rl is not None
    assert after.rl is not None
    assert (after.rl.group_size, after.task.chat, after.rl.sampling.stop) == (4, False, (".", "\n"))
    assert after.rl.sampling.max_new_tokens == before.rl.sampling.max_new_tokens
    assert after.layout == before.layout


@pytest.mark.parametrize("text", ["plain", "2024", "2024-01-01", "true", "a=b", "[x]", "with space", "../up/{name}"])
def test_text_needs_no_quotes(text: str) -> None:
    assert parse({}, [f"name={text}"]).name == text
    assert parse({}, [f'name="{text}"']).name == text


def test_an_optional_section_is_built_by_overrides() -> None:
    assert parse({}).rl is None
    recipe = parse({}, ["rl.steps=3", "supervised.optimizer.learning_rate=1e-3"])
    assert recipe.rl is not None
    assert recipe.supervised is not None
    assert (recipe.rl.steps, recipe.supervised.optimizer.learning_rate) == (3, 1e-3)


def test_the_last_override_wins() -> None:
    assert parse({"seed": 1}, ["seed=2", "seed=3"]).seed == 3


def test_the_folder_takes_the_name_and_leaves_other_braces() -> None:
    assert parse({}, ["name=a", "run=out/{name}/{other}"]).folder == Path("out/a/{other}")


@settings(deadline=None)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
    seed=st.integers(0, 2**62),
    rate=st.floats(1e-9, 1e3),
    stop=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)),
    chat=st.booleans(),
)
def test_a_resolved_recipe_reads_back_as_itself(
    tmp_path_factory: pytest.TempPathFactory, name: str, seed: int, rate: float, stop: list[str], chat: bool
) -> None:
    values = {"name": name, "seed": seed, "task": {"chat": chat}, "supervised": {}}
    recipe = parse(values | {"rl": {"optimizer": {"learning_rate": rate}, "sampling": {"stop": stop}}})
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == with_absolute_paths(recipe)


def test_every_recipe_of_the_repository_reads_back_as_itself(tmp_path: Path) -> None:
    for path in QUICKSTART.parent.glob("*.toml"):
        recipe = load_recipe(path)
        (tmp_path / path.name).write_text(to_toml(recipe), encoding="utf-8")
        assert load_recipe(tmp_path / path.name) == recipe


@settings(deadline=None)
@given(key=st.sampled_from(KEYS), place=st.integers(0, 30), letter=st.sampled_from(string.ascii_lowercase), kind=...)
def test_one_wrong_letter_is_understood(key: str, place: int, letter: str, kind: bool) -> None:
    head, _, last = key.rpartition(".")
    place %= len(last)
    wrong = last[:place] + letter + last[place + kind :]
    assume(wrong != last)
    given_key = f"{head}.{wrong}".lstrip(".")
    with pytest.raises(RecipeError) as caught:
        parse(nested(given_key, 1))
    found = re.search(r"nearest is ([\w.]+)", str(caught.value))
    assert found is not None
    assert found[1] == key


def test_defaults_are_a_recipe() -> None:
    assert parse({}) == Recipe()


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_program_may_give_a_recipe_in_any_form(name: str) -> None:
    recipe = load_recipe(name)
    values = tomllib.loads(shipped_recipes()[name].read_text())
    assert resolve(name) == resolve(shipped_recipes()[name]) == resolve({"extends": name}) == resolve(recipe) == recipe
    assert "extends" in values or resolve(values) == recipe


def test_a_program_overrides_with_values() -> None:
    given = {"extends": "quickstart", "rl": {"steps": 3}}
    overrides = {"rl.group_size": 4, "task.stop": ("a",), "layout": {"data": 1}, "run": Path("/runs"), "name": "2024"}
    recipe = resolve(given, overrides)
    assert recipe.rl is not None
    assert (recipe.rl.steps, recipe.rl.group_size, recipe.rl.prompts_per_step) == (3, 4, 48)
    assert (recipe.task.stop, recipe.layout.data, recipe.run, recipe.name) == (["a"], 1, "/runs", "2024")
    assert given == {"extends": "quickstart", "rl": {"steps": 3}}
    changed = resolve(recipe, {"rl.method": "dapo"})
    assert changed.rl is not None
    assert (changed.rl.denominator, changed.rl.group_size) == ("kept", 4)
    with pytest.raises(RecipeError, match=r"'rl\.\.steps' is not of the form"):
        resolve("quickstart", {"rl..steps": 3})
    with pytest.raises(RecipeError, match="seed is a value, not a section"):
        resolve("quickstart", {"seed.x": 3})
    with pytest.raises(RecipeError, match="the recipe extends nobody, and there is none"):
        resolve({"extends": "nobody"})


PUNISHED = {"overlong": {"weight": 1.0, "maximum": 9, "cache": 4}}
SHORT = {"sampling": {"max_new_tokens": 5}}
TWO = [{"name": "a"}, {"name": "b", "chat": False}]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tasks": TWO, "task": {"train": 5}}, "one task, with [task], or a mixture of several, with [[tasks]]"),
        ({"tasks": [{"name": "a"}, {"name": "a"}]}, "two of tasks are called a: give each a name of its own"),
        ({"tasks": TWO, "environment": {"kind": "tools"}}, "an environment speaks one template with all tasks"),
        ({"tasks": [{"train": 3}]}, "tasks[0].name"),
        ({"tasks": [{"name": "a", "reward": {"functions": [{"function": "f"}]}}]}, "tasks[0].reward.functions[0].fun"),
        ({"tasks": [{"name": "a", "reward": PUNISHED}], "rl": SHORT}, "reward.overlong begins behind 5 tokens"),
        ({"tasks": TWO, "evaluation": {"tasks": [{"name": "b"}]}}, "two of tasks are called b"),
        ({"tasks": TWO, "evaluation": {"best": "c"}}, "evaluation.best='c' is no task: name one of a, b, or leave"),
        ({"evaluation": {"best": "c"}}, "name one where there are [[tasks]] or [[evaluation.tasks]]"),
        ({"evaluation": {"tasks": [{"name": "c", "curriculum": "a:f"}]}}, "curriculum is of problems that are trained"),
        ({"evaluation": {"tasks": [{"name": "c", "weight": 2}]}}, "evaluation.tasks[0].weight is not a key"),
        ({"tasks": [{"name": "a", "curriculum": "a:f"}]}, "weighs problems in the steps of [rl], which is not there"),
    ],
)
def test_mixtures_that_do_not_fit_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(values)
    assert said in str(caught.value)


def test_a_recipe_has_one_task_or_those_of_its_mixture() -> None:
    alone, several = parse({"task": {"train": 5}}), parse({"tasks": TWO})
    assert alone.mixture == (alone.task,)
    assert [task.name for task in several.tasks] == ["a", "b"]
    assert several.mixture == several.tasks


def test_a_task_of_a_mixture_may_have_a_reward_of_its_own(tmp_path: Path) -> None:
    own = {"correctness": 2, "functions": [{"function": "mine.py:brief", "weight": 1}]}
    recipe = with_absolute_paths(parse({"tasks": [TWO[0] | {"reward": own}, TWO[1]], "reward": {"correctness": 3}}))
    assert [recipe.rewards.of(name).correctness for name in ("a", "b", "")] == [2, 3, 3]
    key = "tasks[0].reward.functions[0].function"
    assert dict(functions(recipe)) == {key: f"{Path.cwd()}/mine.py:brief"}
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "recipe.toml") == recipe
