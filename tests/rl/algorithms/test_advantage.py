"""Advantages against their formulas; a grader that failed says nothing about anybody."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lockstep.rl.algorithms.advantage import best, centred, gae, leave_one_out, overlong, whitened
from lockstep.rl.algorithms.config import RLConfig
from lockstep.rl.algorithms.rewards import CORRECTNESS, rewarded
from lockstep.rl.algorithms.samples import teaches, with_advantages
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.types import Estimated, Estimates, Judged, Prompt, Reward, Rollout
from lockstep.rl.verdict import Outcome, Verdict

METHODS = {True: RLConfig(), False: RLConfig(method="dr_grpo")}
"""By whether they scale by the deviation."""

outcomes = st.lists(st.sampled_from(Outcome), max_size=10)


def completion(number: int, verdict: Verdict, reward: float | None) -> Estimated:
    prompt = Prompt(0, "1 + 1 =", (1, 2), "2")
    rollout = Rollout(number, (3,), (-0.5,), "2", "stop", (0,), prompt=prompt)
    return Estimated(rollout, verdict, Reward(reward, {}), Estimates())


def group(results: list[Outcome]) -> list[Estimated]:
    return [completion(i, Verdict(outcome), Verdict(outcome).reward) for i, outcome in enumerate(results)]


def earning(rewards: list[float]) -> list[Estimated]:
    return [completion(i, Verdict(Outcome.correct), reward) for i, reward in enumerate(rewards)]


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
    compared = with_advantages(group(results), METHODS[scale])
    graded = [1.0 if o is Outcome.correct else 0.0 for o in results if o is not Outcome.ungradable]
    expected = iter(centred(graded, scale_by_deviation=scale))
    assert [s.rollout.sample for s in compared] == list(range(len(results)))
    for one, outcome in zip(compared, results, strict=True):
        assert one.verdict.outcome is outcome
        assert one.advantage == (None if outcome is Outcome.ungradable else next(expected))


@given(outcomes, st.booleans())
def test_a_group_teaches_where_its_rewards_differ(results: list[Outcome], scale: bool) -> None:
    assert teaches(group(results), METHODS[scale]) == ({Outcome.correct, Outcome.incorrect} <= set(results))
    found = with_advantages(group(results), METHODS[scale])
    assert math.isclose(sum(s.advantage or 0.0 for s in found), 0, abs_tol=1e-9)


WHOLE = [RLConfig.model_validate({"advantage": name}) for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")]


@pytest.mark.parametrize("method", WHOLE, ids=lambda method: method.advantage)
@given(reward=st.floats(-10, 10), size=st.integers(1, 9))
@example(reward=0.1, size=3)
def test_equal_rewards_never_teach(method: RLConfig, reward: float, size: int) -> None:
    """The mean of three times 0.1 is not 0.1 in fp64, so that advantages are 1e-17 and not 0."""
    assert not teaches(earning([reward] * size), method)
    assert teaches(earning([reward] * size + [reward + 1e-6]), method)


def test_what_teaches_where_a_group_is_no_baseline() -> None:
    alike, lost = group([Outcome.incorrect] * 2), group([Outcome.ungradable] * 2)
    for method in ("ppo", "reinforce_pp"):
        assert teaches(alike, RLConfig(method=method))
        assert not teaches(lost, RLConfig(method=method))
    assert teaches(lost, RLConfig(method="distill"))
    best_of = RLConfig(method="rsft", accept_above=0.5)
    assert [teaches(earning(r), best_of) for r in ([0.5, 0.5], [0.6, 0.6], [0.1, 0.7], [])] == [
        False,
        True,
        True,
        False,
    ]


def test_groups_are_told_apart_by_their_overlong_punishment() -> None:
    short, long = earning([1.0, 1.0])
    long = replace(long, rollout=replace(long.rollout, tokens=(3,) * 9, logp=(-0.5,) * 9, weight_versions=(0,) * 9))
    for share, differ in ((0.2, True), (0.0, False)):
        config = RLConfig(overlong_share=share, sampling=SamplingParams(max_new_tokens=10))
        group = rewarded([short, long], CORRECTNESS, config.punishment)
        assert teaches(group, config) is differ
        assert [each.reward.net for each in group] == [1.0, 0.5 if differ else 1.0]
        assert [each.reward.total for each in group] == [1.0, 1.0], "what is reported has no punishment in it"
        estimated = [Estimated(each.rollout, each.verdict, each.reward, Estimates()) for each in group]
        assert ([each.advantage for each in with_advantages(estimated, config)] == [0.0, 0.0]) is not differ


NO_NUMBERS = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("method", WHOLE, ids=lambda method: method.advantage)
@pytest.mark.parametrize("score", NO_NUMBERS)
def test_a_reward_that_is_no_number_is_left_out(score: float, method: RLConfig) -> None:
    """As of a reward model whose score overflowed: it neither tells a group apart nor spoils the others' advantages."""
    [rollout] = [each.rollout for each in earning([0.0])]
    judged = [Judged(rollout, Verdict(Outcome.correct), score=s) for s in (score, 0.5, 0.5, score, 0.5)]
    alike = rewarded(judged, CORRECTNESS)
    assert not teaches(alike, method)
    assert teaches(rewarded([*judged, replace(judged[1], score=0.25)], CORRECTNESS), method)
    found = with_advantages([Estimated(r.rollout, r.verdict, r.reward, Estimates()) for r in alike], method)
    assert [each.advantage for each in found] == [None, 0.0, 0.0, None, 0.0]


ALIKE = {
    "sums in another order": [0.1 + 0.2, 0.3, 0.2 + 0.1],
    "one of them is gradable": [None, 1.0, None],
    "none is gradable": [None, None],
    "large": [1e9 + 1e-7, 1e9],
    "both zeros": [0.0, -0.0],
}


@pytest.mark.parametrize("rewards", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("method", WHOLE, ids=lambda method: method.advantage)
def test_rewards_that_differ_by_rounding_have_no_advantage(rewards: list[float | None], method: RLConfig) -> None:
    group = [completion(i, Verdict(Outcome.correct), reward) for i, reward in enumerate(rewards)]
    assert not teaches(group, method)
    found = [each.advantage for each in with_advantages(group, method)]
    assert found == [None if reward is None else 0.0 for reward in rewards]


@pytest.mark.parametrize(
    ("scale", "right", "wrong"),
    [(False, 0.75, -0.25), (True, math.sqrt(3), -1 / math.sqrt(3))],
    ids=["dr_grpo", "grpo"],
)
def test_one_right_of_four(scale: bool, right: float, wrong: float) -> None:
    results = [Outcome.incorrect, Outcome.correct, Outcome.ungradable, Outcome.incorrect, Outcome.incorrect]
    found = [s.advantage for s in with_advantages(group(results), METHODS[scale])]
    assert found[2] is None
    assert [f for f in found if f is not None] == pytest.approx([wrong, right, wrong, wrong], rel=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_equal_rewards_have_no_advantage(reward: float, size: int) -> None:
    assert centred([reward] * size, scale_by_deviation=True) == pytest.approx([0.0] * size, abs=1e-9)


numbers = st.floats(-10, 10)


@given(st.lists(numbers, max_size=8))
def test_leave_one_out_equals_its_formula(rewards: list[float]) -> None:
    others = [[r for j, r in enumerate(rewards) if j != i] for i in range(len(rewards))]
    expected = [r - statistics.fmean(rest) if rest else 0.0 for r, rest in zip(rewards, others, strict=True)]
    assert leave_one_out(rewards) == pytest.approx(expected, abs=1e-9)


def test_best_is_the_first_of_the_highest_above_the_bound() -> None:
    assert best([0.0, 1.0, 1.0], 0.0) == [None, 1.0, None]
    assert best([0.0, 0.0], 0.0) == [None, None]
    assert best([-2.0, -1.0], -math.inf) == [None, 1.0]
    assert best([], 0.0) == []


def test_advantages_of_three_steps_by_hand() -> None:
    """γ = λ = ½, so that δ_t counts ¼ a step later."""
    advantages, goals = gae(np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.25, 0.75]), discount=0.5, trace=0.5)
    last = 1 - 0.75
    middle = 0.5 * 0.75 - 0.25 + 0.25 * last
    first = 0.5 * 0.25 - 0.5 + 0.25 * middle
    assert advantages.tolist() == [first, middle, last]
    assert goals.tolist() == [first + 0.5, middle + 0.25, 1.0]


@given(st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=2, max_size=4), st.booleans())
def test_whitened_numbers_have_a_deviation_of_one(parts: list[list[float]], shift: bool) -> None:
    every = [n for part in parts for n in part]
    found = whitened([np.array(part) for part in parts], shift=shift)
    assert [len(part) for part in found] == [len(part) for part in parts]
    if statistics.pstdev(every) > 0.01:
        flat = [n for part in found for n in part.tolist()]
        assert statistics.pstdev(flat) == pytest.approx(1, rel=1e-3)
        assert statistics.fmean(flat) == pytest.approx(0 if shift else statistics.fmean(every), abs=1e-6)


@pytest.mark.parametrize(("length", "loss"), [(1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (101, -1.0)])
def test_the_last_fifth_of_the_limit_costs_up_to_one(length: int, loss: float) -> None:
    assert overlong(length, 100, 20) == pytest.approx(loss)


@given(st.integers(0, 300), st.integers(1, 200), st.data())
def test_soft_overlong_punishment_is_the_papers_three_cases(tokens: int, maximum: int, data: st.DataObject) -> None:
    cache = data.draw(st.integers(1, maximum))
    if tokens <= maximum - cache:
        wanted = 0.0
    elif tokens <= maximum:
        wanted = ((maximum - cache) - tokens) / cache
    else:
        wanted = -1.0
    assert overlong(tokens, maximum, cache) == pytest.approx(wanted, abs=1e-12)
