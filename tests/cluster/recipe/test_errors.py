"""Whatever a recipe holds, it is taken or refused in one sentence that names the key, and the nearest one."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import parse
from lockstep.cluster.recipe.schema import Recipe
from tests.cluster.recipe.test_paths import fields

KEYS = [key for key, _ in fields(Recipe)]
SHAPE = {"layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "head_dim": 8, "intermediate": 8, "vocabulary": 9}


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(values)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"pretrain": {"steps": 1, "data": {"blend": [{"path": "a"}, {"weight": 2.0}]}}},
            "pretrain.data.blend[1].path is missing: keys here are pretrain.data.blend.path, pretrain.data.blend.w",
        ),
        ({"pretrain": {}}, "pretrain.steps is missing: keys here are pretrain.steps, "),
        ({"pretrain": {"steps": 1, "data": {}}}, "pretrain.data.blend is missing"),
        ({"model": {"config": SHAPE}}, "model.config.context is missing"),
        ({"model": {"config": SHAPE | {"context": 9, "moe": {"experts": 4}}}}, "model.config.moe.experts_per_token is"),
        ({"pretrain": {"stps": 3}}, "pretrain.stps is not a key of this recipe; the nearest is pretrain.steps"),
        (
            {"pretrain": {"steps": 1, "data": {"blend": [{"pth": "a"}]}}},
            "pretrain.data.blend[0].pth is not a key of this recipe; the nearest is pretrain.data.blend.path",
        ),
        (
            {"pretrain": {"steps": 1, "data": {"blend": [{"path": "a", "weight": -1.0}]}}},
            "pretrain.data.blend[0].weight=-1.0 is not allowed: input should be greater than 0",
        ),
        (
            {"pretrain": {"steps": 1, "data": {"blend": [3]}}},
            "pretrain.data.blend[0]=3 is not allowed: it is a section",
        ),
        ({"task": {"fields": {"question": 3}}}, "task.fields.question=3 is not allowed"),
        ({"model": {"config": SHAPE | {"context": 9, "rope": {"theta": "x"}}}}, "model.config.rope.theta"),
        ({"model": {"config": SHAPE | {"context": 9, "rope": 3}}}, "model.config.rope=3 is not allowed"),
        ({"trainer": {"trainable": {"tensors": [3]}}}, "trainer.trainable.tensors"),
        ({"rl": {"sampling": {"logit_bias": {"x": 1.0}}}}, 'rl.sampling.logit_bias.x="x" is not allowed'),
        ({"task": {"preset": ["x"]}}, "task.preset"),
        ({"task": {"preset": {"x": 1}}}, "task.preset"),
        ({"pretrain": {"steps": 1, "data": {"blend": [{"path": "a", "weight": float("nan")}]}}}, "blend[0].weight=nan"),
        ({"verifier": {"llm_judge": {"model": "m"}}}, "verifier.llm_judge.url is missing"),
        (
            {"verifier": {"llm_judge": {"url": "h", "model": "m"}}},
            'verifier.llm_judge.url="h" is not allowed: it is no',
        ),
        ({"verifier": {"llm_judge": {"url": "http://h/v1", "model": "m"}}}, "verifier.llm_judge is asked for nothing"),
        (
            {"task": {"grader": "llm_judge"}},
            "llm_judge is asked for scores, and there is none: give verifier.llm_judge",
        ),
        ({"reward": {"functions": [{"function": "llm_judge"}]}}, "llm_judge is asked for scores, and there is none"),
        (
            {"reward": {"functions": [{"function": "llm"}]}},
            "reward.functions[0].function=\"llm\" is not allowed: 'llm' n",
        ),
        ({"model": {"config": {"lora": {"\n": 1}}}}, 'model.config.lora."\\n" is not a key of this recipe'),
        ({"name": {"\r": float("inf")}}, 'name."\\r"=inf is not allowed'),
        ({"reward": {"format": {"pattern": "a{99999999999999999999}"}}}, "reward.format.pattern="),
    ],
)
def test_the_key_itself_is_named(values: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(values)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["{name}", "a{9999999999}"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


TEXT = st.text(max_size=12)


def nested(key: str, value: object) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def sentence(values: dict[str, Any], *overrides: str) -> str | None:
    """What a recipe is refused with, if it is."""
    try:
        parse(values, overrides)
    except RecipeError as error:
        return str(error)
    return None


@settings(max_examples=400)
@given(key=st.sampled_from(KEYS), value=ANYTHING)
def test_any_value_is_taken_or_refused_in_a_sentence(key: str, value: object) -> None:
    said = sentence(nested(key, value))
    assert said is None or (said.isprintable() and any(part in said for part in key.split(".")))


@settings(max_examples=200)
@given(key=st.sampled_from(KEYS), name=st.text("abcdefgh_.[]0\n\x1f", min_size=1, max_size=6), text=TEXT)
def test_any_override_is_taken_or_refused_in_a_sentence(key: str, name: str, text: str) -> None:
    for override in (f"{key}={text}", f"{key}.{name}={text}", f"{name}={text}", f"{name}{text}"):
        said = sentence({}, override)
        assert said is None or (said and said.isprintable())


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(RecipeError):
        parse({}, ["task.settings=" + "[" * 5000 + "]" * 5000])
