"""What a recipe with another rollout engine needs, and what it corrects for by default."""

from typing import Any

import pytest

from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import parse, to_toml
from lockstep.cluster.recipe.reader import read_values
from lockstep.rl.algorithms.methods import CorrectionConfig

VLLM = {"engine": "vllm", "python": ".venv-vllm/bin/python"}


@pytest.mark.parametrize("method", ["grpo", "rloo", "ppo", "gspo", "cispo"])
def test_an_inexact_engine_has_truncated_importance_sampling(method: str) -> None:
    rl = parse({"rollout": VLLM, "rl": {"method": method}}).rl
    assert rl is not None
    assert (rl.proximal, rl.correction) == ("trainer", CorrectionConfig(kind="truncate", level="token", high=2.0))
    ours = parse({"rl": {"method": method}}).rl
    assert ours is not None
    assert ours.correction is None


@pytest.mark.parametrize(
    "rl",
    [{"method": "rsft"}, {"proximal": "rollout"}, {"clip_low": 0.1}, {"proximal": "trainer", "epochs": 2}],
    ids=str,
)
def test_a_recipe_that_says_what_ratios_are_to_is_left_as_it_is(rl: dict[str, Any]) -> None:
    found = parse({"rollout": VLLM, "rl": rl}).rl
    assert found is not None
    assert found.correction is None
    assert all(getattr(found, key) == value for key, value in rl.items())


def test_a_resolved_recipe_is_the_same_when_it_is_read_again() -> None:
    recipe = parse({"rollout": VLLM, "rl": {"steps": 3}})
    assert to_toml(parse(read_values(recipe.model_dump(mode="json", exclude_none=True)))) == to_toml(recipe)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rollout": {"engine": "vllm"}}, "name its interpreter in rollout.python"),
        ({"rollout": {"python": "python3"}}, "python=python3 is of engine='vllm'"),
        ({"rollout": {**VLLM, "tensor": 2}}, "tensor=2: set tensor=1"),
        ({"rollout": {**VLLM, "speculate": 4}}, "speculate=4: set speculate=0, or engine='lockstep'"),
        ({"rollout": VLLM, "model": {"numerics": "exact"}}, "the same bits, which rollout.engine='vllm' does not"),
        ({"rollout": VLLM, "rl": {"flow": {"release": True}}}, "rl.flow.release=true has no effect"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse(values)
