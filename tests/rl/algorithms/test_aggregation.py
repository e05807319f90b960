"""What a completion weighs, by hand: in every aggregation, beside groups that teach nothing, and under every filter."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lockstep.rl.algorithms.aggregation import GroupSamples, updates_of
from lockstep.rl.algorithms.config import RLConfig
from lockstep.rl.algorithms.samples import asked_for, samples_of, teaches, with_advantages
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.types import Estimated, Estimates, Prompt, Reward, Rollout
from lockstep.rl.verdict import Outcome, Verdict

LIMIT = 10


def config(method: str, **keys: Any) -> RLConfig:
    return RLConfig.model_validate({"method": method, "sampling": SamplingParams(max_new_tokens=LIMIT), **keys})


def group(number: int, *completions: tuple[float | None, int]) -> list[Estimated]:
    """Completions of these rewards and lengths; the reference likes each token less by 0.1 than the one before."""
    prompt, found = Prompt(number, "", (100 + number,), ""), []
    for place, (reward, length) in enumerate(completions):
        outcome = Outcome.ungradable if reward is None else Outcome.correct
        tokens = tuple(range(length))
        reason = "length" if length == LIMIT else "stop"
        rollout = Rollout(place, tokens, (-1.0,) * length, "", reason, (0,) * length, prompt=prompt)
        known = Estimates(reference_logp=np.float32(-1 - 0.1 * np.arange(length)), value=np.zeros(length, np.float32))
        found.append(Estimated(rollout, Verdict(outcome), Reward(reward, {}), known))
    return found


def parts(groups: Sequence[Sequence[Estimated]], chosen: RLConfig) -> list[GroupSamples]:
    teaching = [teaches(each, chosen) for each in groups]
    return samples_of([with_advantages(each, chosen) for each in groups], teaching, chosen)


def learned(groups: Sequence[Sequence[Estimated]], chosen: RLConfig) -> list[tuple[int, int, float, float]]:
    """Group, length, weight and advantage of each sample of the first update."""
    batch = next(updates_of(parts(groups, chosen), chosen, 0))
    return [
        (int(s.prompt[0]) - 100, len(s.completion), float(s.weight[-1]), float(s.advantage[-1].round(5))) for s in batch
    ]


LIVE = group(0, (1.0, 2), (0.0, 4))
SOLVED = group(1, (1.0, 3), (1.0, 3))
WEIGHTS: dict[tuple[str, str], tuple[float, float, float, float]] = {
    # of the four completions; 12 tokens in all, 6 in the live group
    ("tokens", "batch"): (1 / 12, 1 / 12, 1 / 12, 1 / 12),
    ("tokens", "kept"): (1 / 6, 1 / 6, 0, 0),
    ("sequences", "batch"): (1 / 4 / 2, 1 / 4 / 4, 1 / 4 / 3, 1 / 4 / 3),
    ("sequences", "kept"): (1 / 2 / 2, 1 / 2 / 4, 0, 0),
    ("constant", "batch"): (1 / 4 / LIMIT,) * 4,
    ("constant", "kept"): (1 / 2 / LIMIT, 1 / 2 / LIMIT, 0, 0),
}


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(("aggregation", "denominator"), WEIGHTS)
def test_weights_beside_a_group_that_teaches_nothing(aggregation: str, denominator: str, beta: float) -> None:
    """It counts in the mean, and is learned from where its KL is in the loss."""
    weights = WEIGHTS[aggregation, denominator]
    chosen = config("dr_grpo", aggregation=aggregation, denominator=denominator, kl_beta=beta)
    expected = [(0, 2, weights[0], 0.5), (0, 4, weights[1], -0.5)]
    if beta and denominator == "batch":
        expected += [(1, 3, weights[2], 0.0), (1, 3, weights[3], 0.0)]
    assert learned([LIVE, SOLVED], chosen) == [pytest.approx(each, rel=1e-6) for each in expected]


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "gspo", "cispo"])
def test_one_live_group_beside_31_solved_ones_has_a_32nd_of_the_mean(method: str) -> None:
    chosen = config(method)
    live, solved = group(0, (1.0, 4), (0.0, 4)), [group(n, (1.0, 4), (1.0, 4)) for n in range(1, 32)]
    alone, beside = learned([live], chosen), learned([live, *solved], chosen)
    assert [each[0] for each in beside] == [0, 0]
    assert [w for _, _, w, _ in beside] == pytest.approx([w / 32 for _, _, w, _ in alone], rel=1e-6)
    assert [a for *_, a in beside] == [a for *_, a in alone]


def test_dapo_is_a_mean_over_groups_that_differ() -> None:
    alone, beside = (learned(groups, config("dapo")) for groups in ([LIVE], [LIVE, SOLVED, SOLVED]))
    assert beside == alone


@pytest.mark.parametrize(("method", "scale"), [("rloo", 2.0), ("dr_grpo", 1.0), ("grpo", 1.0)])
def test_kl_in_the_reward_tells_a_solved_group_apart(method: str, scale: float) -> None:
    """Σ k1 is 0.3 of three tokens and 0.6 of four. With a deviation of rewards of 0, nothing is divided by it."""
    solved = group(1, (1.0, 3), (1.0, 4))
    chosen = config(method, kl_beta=0.5, kl_place="reward", kl_estimator="k1")
    found = [sample for sample in learned([LIVE, solved], chosen) if sample[0] == 1]
    assert [a for *_, a in found] == pytest.approx([0.075 * scale, -0.075 * scale], abs=1e-6)


def test_the_ungradable_and_the_cut_count_and_do_not_teach() -> None:
    """They were asked for: 2 + 4 + 5 + 10 tokens. KL is known of the ungradable; what was cut is dropped as a whole."""
    mixed = [group(0, (1.0, 2), (0.0, 4), (None, 5), (0.0, LIMIT))]
    plain, drawn = (config("dr_grpo", aggregation="tokens", overlong="drop", kl_beta=b) for b in (0.0, 0.1))
    assert [(n, w) for _, n, w, _ in learned(mixed, plain)] == [(n, pytest.approx(1 / 21)) for n in (2, 4)]
    assert [(n, w) for _, n, w, _ in learned(mixed, drawn)] == [(n, pytest.approx(1 / 21)) for n in (2, 4, 5)]
    assert learned(mixed, drawn)[2][3] == 0
    kept = config("dr_grpo", aggregation="tokens", overlong="drop", kl_beta=0.1, denominator="kept")
    assert [(n, w) for _, n, w, _ in learned(mixed, kept)] == [(n, pytest.approx(1 / 6)) for n in (2, 4)]


def test_a_critic_learns_nothing_of_a_completion_without_a_reward() -> None:
    mixed = [group(0, (1.0, 2), (None, 5)), group(1, (None, 3), (None, 3))]
    chosen = config("ppo", kl_beta=0.1, kl_place="loss", kl_estimator="k2")
    assert [(n, w) for _, n, w, _ in learned(mixed, chosen)] == [(2, pytest.approx(1 / 13))]


def test_an_entropy_bonus_is_of_every_group() -> None:
    assert {each[0] for each in learned([LIVE, SOLVED], config("grpo", entropy=0.01))} == {0, 1}


def test_likelihood_of_the_best_is_a_mean_over_the_accepted() -> None:
    assert learned([LIVE, SOLVED], config("rsft")) == [
        (0, 2, pytest.approx(1 / 5), 1.0),
        (1, 3, pytest.approx(1 / 5), 1.0),
    ]


@pytest.mark.parametrize(
    ("teaching", "expected"),
    [
        ([True, True, True], [0, 1, 2]),
        ([False, True, False, True, True], [1, 3, 4]),
        ([False, True, False, False, True, False], [0, 1, 4]),
        ([False, False, False, False], [0, 1, 2]),
        ([True, False, False], [0, 1, 2]),
    ],
)
def test_a_batch_has_as_many_groups_as_were_asked_for(teaching: list[bool], expected: list[int]) -> None:
    """Where dynamic sampling found no other in its place, a group that teaches nothing remains in the batch."""
    found, live = asked_for(list(range(len(teaching))), teaching, 3)
    assert found == expected
    assert live == [teaching[n] for n in expected]


def test_minibatches_are_means_over_their_own_completions() -> None:
    groups = [group(n, (float(n % 2), 2 + n), (0.0, 3)) for n in range(6)]
    chosen = config("dr_grpo", aggregation="tokens", minibatches=3, epochs=2)
    counted = {n: 5 + n for n in range(6)}
    live = {n for n in range(6) if n % 2}
    updates = list(updates_of(parts(groups, chosen), chosen, 7))
    of = [{int(s.prompt[0]) - 100 for s in update} for update in updates]
    assert sorted(n for part in of for n in part) == sorted([*live, *live])
    everything = config("dr_grpo", aggregation="tokens", minibatches=3, epochs=2, kl_beta=0.1)
    whole = list(updates_of(parts(groups, everything), everything, 7))
    assert [len({int(s.prompt[0]) for s in update}) for update in whole] == [2] * 6
    for update in whole:
        numbers = {int(s.prompt[0]) - 100 for s in update}
        assert [float(s.weight[0]) for s in update] == [pytest.approx(1 / sum(counted[n] for n in numbers))] * len(
            update
        )
