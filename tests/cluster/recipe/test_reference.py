"""The reference of keys is made from their types, complete, true, and the page in the repository."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.keys import dotted_keys
from lockstep.cluster.recipe.load import parse
from lockstep.cluster.recipe.reference import Key, markdown, reference, sections_below
from lockstep.cluster.recipe.schema import Recipe

PAGE = Path(__file__).parents[3] / "docs" / "recipe.md"
KEYS = {key.name: key for section in sections_below("") for key in section.keys}


def test_the_page_is_what_the_command_prints() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "lockstep recipe keys --format markdown > docs/recipe.md"


def test_every_key_and_every_section_is_described() -> None:
    assert not [name for name, key in KEYS.items() if not key.description or not key.values]
    assert all(section.description for section in reference() if section.name)


def test_every_key_that_an_override_may_name_is_there() -> None:
    sections = {section.name for section in reference()}
    assert {*dotted_keys(Recipe)} <= {*KEYS, *sections}


@pytest.mark.parametrize(
    ("name", "values", "default"),
    [
        ("seed", "integer ≥ 0", "0"),
        ("layout.zero", "integer ≥ 0, ≤ 3", "1"),
        ("rl.clip_dual", "number > 1", ""),
        ("model.dtype", '"bfloat16", "float32"', '"bfloat16"'),
        ("rollout.length", "integer ≥ 2", "512"),
        ("task.stop", "list of: string", "[]"),
        ("task.settings", "table", "{}"),
        ("rl.sampling.logit_bias", "table of: number ≥ -1000000000, ≤ 1000000000", "{}"),
        ("trainer.trainable.tensors", '"all", "biases", "adapters" or list of: string', ""),
        ("verifier.sandbox.requires", 'list of: "namespaces", "seccomp", "landlock"', '["namespaces", "seccomp"]'),
    ],
)
def test_types_bounds_and_defaults(name: str, values: str, default: str) -> None:
    assert (KEYS[name].values, KEYS[name].default) == (values, default)


def bounded() -> Iterator[tuple[Key, str]]:
    """Keys with a value that is just out of bounds."""
    for key in KEYS.values():
        for sign, bound in re.findall(r"^(?:integer|number) ([≥>]) (\S+?)(?:,|$)", key.values):
            wrong = float(bound) - (sign == "≥")
            yield key, f"{wrong:.0f}" if key.values.startswith("integer") else f"{wrong}"


NEEDED: dict[str, dict[str, object]] = {
    "pretrain": {"pretrain": {"steps": 1}},
    "verifier.llm_judge": {"verifier": {"llm_judge": {"url": "http://127.0.0.1:1/v1", "model": "m"}}},
}
"""What else has to be in a section."""


def test_what_is_out_of_the_bounds_is_refused() -> None:
    within = (
        "model.config",
        "pretrain.data",
        "pretrain.retain.old",
        "tasks.",
        "evaluation.tasks.",
    )  # required, and elements of lists, which an override sets whole
    cases = [(key, value) for key, value in bounded() if not key.name.startswith(within)]
    assert len(cases) > 100
    for key, value in cases:
        needed = next((given for section, given in NEEDED.items() if key.name.startswith(section)), {})
        with pytest.raises(RecipeError) as caught:
            parse(needed, [f"{key.name}={value}"])
        assert str(caught.value).startswith(f"{key.name}={value} is not allowed"), key


def test_a_default_is_what_a_recipe_has() -> None:
    recipe = parse({}).model_dump(mode="json")
    assert KEYS["checkpoints.grace"].default == str(recipe["checkpoints"]["grace"])
    assert KEYS["rollout.workers"].default == str(recipe["rollout"]["workers"])
    assert KEYS["verifier.sandbox.memory_mib"].default == str(recipe["verifier"]["sandbox"]["memory_mib"])


def test_a_key_without_a_default_is_required() -> None:
    assert KEYS["model.config.layers"].required
    assert "(required)" in str(KEYS["model.config.layers"])
    assert not KEYS["rl.clip_dual"].required
    with pytest.raises(RecipeError, match=r"model\.config\.layers is missing"):
        parse({"model": {"config": {}}})


def test_a_prefix_chooses_and_an_unknown_one_names_the_nearest() -> None:
    assert [key.name for section in sections_below("layout.ze") for key in section.keys] == ["layout.zero"]
    assert {section.name for section in sections_below("rl.flow")} == {"rl.flow"}
    with pytest.raises(RecipeError, match=r"layuot is not a key of this recipe; the nearest is layout"):
        list(sections_below("layuot"))
