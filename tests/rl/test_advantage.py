"""Advantages against their formulas; a grader that failed says nothing about anybody."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.rl.advantage import centred, teaches, with_advantages
from lockstep.rl.types import Prompt, Rollout, Scored
from lockstep.rl.verifiers.verdict import Outcome, Verdict

outcomes = st.lists(st.sampled_from(Outcome), max_size=10)


def group(results: list[Outcome]) -> list[Scored]:
    prompt = Prompt(0, "1 + 1 =", (1, 2), "2")
    return [
        Scored(Rollout(prompt, i, (3,), (-0.5,), "2", "stop", (0,)), Verdict(outcome))
        for i, outcome in enumerate(results)
    ]


@given(st.lists(st.floats(-10, 10), max_size=12), st.booleans())
def test_centred_equals_its_formula(rewards: list[float], scale: bool) -> None:
    found = centred(rewards, scale_by_deviation=scale)
    mean = statistics.fmean(rewards) if rewards else 0.0
    deviation = statistics.pstdev(rewards) if rewards else 0.0
    expected = [(r - mean) / (deviation + 1e-6 if scale else 1) for r in rewards]
    assert len(found) == len(rewards)
    assert all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-8) for a, b in zip(found, expected, strict=True))


@given(outcomes, st.booleans())
def test_ungradable_rollouts_are_left_out(results: list[Outcome], scale: bool) -> None:
    scored = with_advantages(group(results), scale_by_deviation=scale)
    graded = [1.0 if o is Outcome.correct else 0.0 for o in results if o is not Outcome.ungradable]
    expected = iter(centred(graded, scale_by_deviation=scale))
    assert [s.rollout.sample for s in scored] == list(range(len(results)))
    for one, outcome in zip(scored, results, strict=True):
        assert one.verdict.outcome is outcome
        assert one.advantage == (None if outcome is Outcome.ungradable else next(expected))


@given(outcomes, st.booleans())
def test_a_group_teaches_where_its_rewards_differ(results: list[Outcome], scale: bool) -> None:
    scored = with_advantages(group(results), scale_by_deviation=scale)
    assert teaches(scored) == ({Outcome.correct, Outcome.incorrect} <= set(results))
    assert math.isclose(sum(s.advantage or 0.0 for s in scored), 0, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("scale", "right", "wrong"),
    [(False, 0.75, -0.25), (True, math.sqrt(3), -1 / math.sqrt(3))],
    ids=["dr_grpo", "grpo"],
)
def test_one_right_of_four(scale: bool, right: float, wrong: float) -> None:
    results = [Outcome.incorrect, Outcome.correct, Outcome.ungradable, Outcome.incorrect, Outcome.incorrect]
    found = [s.advantage for s in with_advantages(group(results), scale_by_deviation=scale)]
    assert found[2] is None
    assert [f for f in found if f is not None] == pytest.approx([wrong, right, wrong, wrong], rel=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_equal_rewards_have_no_advantage(reward: float, size: int) -> None:
    assert centred([reward] * size, scale_by_deviation=True) == pytest.approx([0.0] * size, abs=1e-9)
