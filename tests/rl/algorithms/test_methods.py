"""Every method from judged groups to loss and gradient, against its paper's equation, one by one in float64."""

import math
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.rl.algorithms.config import PreferenceConfig, RLConfig
from lockstep.rl.algorithms.methods import METHODS
from lockstep.rl.algorithms.rewards import RewardConfig, reward_of
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.types import Estimated, Estimates, Judged, Prompt, Rollout
from lockstep.rl.verdict import Outcome, Verdict
from tests.rl.drawn import LIMIT, floats, groups_of, policy_of, samples_from, total

Groups = list[list[Estimated]]
Tokens = list[tuple[Tensor, float, float, float, float]]
"""Of the tokens that the model wrote in one rollout: log p of policy, behaviour, trainer, reference; and the value."""


def config(method: str, **keys: Any) -> RLConfig:
    return RLConfig.model_validate({"method": method, "sampling": SamplingParams(max_new_tokens=LIMIT), **keys})


def tokens(scored: Estimated, logp: Tensor) -> Tokens:
    rollout, known = scored.rollout, scored.estimates
    assert known.proximal_logp is not None
    assert known.reference_logp is not None
    assert known.value is not None
    written = rollout.written or (True,) * len(rollout.tokens)
    columns = zip(rollout.logp, known.proximal_logp, known.reference_logp, known.value, strict=True)
    return [
        (logp[token].double(), *map(float, column))
        for token, column, mine in zip(rollout.tokens, columns, written, strict=True)
        if mine
    ]


def graded(group: Sequence[Estimated]) -> list[tuple[Estimated, float]]:
    return [(s, s.verdict.reward) for s in group if s.verdict.reward is not None]


def differ(pairs: Sequence[tuple[Estimated, float]]) -> bool:
    return len({reward for _, reward in pairs}) > 1


def compared(groups: Groups, advantage: Callable[[list[float]], list[float]]) -> list[tuple[Estimated, float]]:
    """Rollouts of groups whose rewards differ."""
    found = []
    for group in groups:
        pairs = graded(group)
        advantages = advantage([reward for _, reward in pairs])
        if differ(pairs):
            found += [(s, a) for (s, _), a in zip(pairs, advantages, strict=True)]
    return found


def every_token(groups: Groups, logp: Tensor) -> Tokens:
    """Of all completions of the batch, whether or not they have a signal."""
    return [token for group in groups for s in group for token in tokens(s, logp)]


def completions(groups: Groups) -> int:
    return sum(map(len, groups))


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def deviation(numbers: Sequence[float]) -> float:
    return math.sqrt(mean([(n - mean(numbers)) ** 2 for n in numbers]))


def scaled(rewards: list[float]) -> list[float]:
    return [(r - mean(rewards)) / (deviation(rewards) + 1e-6) for r in rewards]


def shifted(rewards: list[float]) -> list[float]:
    return [r - mean(rewards) for r in rewards]


def ppo(ratio: Tensor, a: float, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def k3(p: Tensor, r: float) -> Tensor:
    return torch.exp(r - p) - (r - p) - 1


def naive_grpo(groups: Groups, logp: Tensor) -> Tensor:
    """Shao et al. 2024, eq. 3, averaged over tokens, β = 0.04; a group that is all right has its KL."""
    kept = [(token, a) for s, a in compared(groups, scaled) for token in tokens(s, logp)]
    every = every_token(groups, logp)
    gain = sum(ppo((p - t).exp(), a, 0.2, 0.2) / len(every) for (p, _, t, _, _), a in kept)
    return 0.04 * sum(k3(p, r) / len(every) for p, _, _, r, _ in every) - gain


def naive_grpo_of_the_paper(groups: Groups, logp: Tensor) -> Tensor:
    """Shao et al. 2024, eq. 3: 1/G Σ 1/|o_i| Σ."""
    kept = [(tokens(s, logp), a) for s, a in compared(groups, scaled)]
    count = completions(groups)
    return -sum(ppo((p - t).exp(), a, 0.2, 0.2) / len(e) / count for e, a in kept for p, _, t, _, _ in e)


def naive_dr_grpo(groups: Groups, logp: Tensor) -> Tensor:
    """Liu et al. 2025, §3.2: no deviation, no length but a constant one."""
    kept = [(tokens(s, logp), a) for s, a in compared(groups, shifted)]
    count = completions(groups)
    return -sum(ppo((p - t).exp(), a, 0.2, 0.2) / LIMIT / count for e, a in kept for p, _, t, _, _ in e)


def naive_rloo(groups: Groups, logp: Tensor) -> Tensor:
    """Ahmadian et al. 2024, eq. 8 of rewards less 0.1 · KL (k1, of whole completions), in units of the longest."""
    kept = []
    for group in groups:
        pairs = [(s, r - 0.1 * sum(t - ref for _, _, t, ref, _ in tokens(s, logp))) for s, r in graded(group)]
        for i, (s, reward) in enumerate(pairs):
            kept.append((s, reward - mean([r for j, (_, r) in enumerate(pairs) if j != i])))
    return -sum(a * p / LIMIT / completions(groups) for s, a in kept for p, *_ in tokens(s, logp))


def normalised(advantages: list[list[float]]) -> list[list[float]]:
    every = [a for each in advantages for a in each]
    scale = math.sqrt(deviation(every) ** 2 + 1e-8)
    return [[(a - mean(every)) / scale for a in each] for each in advantages]


def averaged(kept: list[Tokens], advantages: list[list[float]], count: int) -> Tensor:
    low, high = 0.2, 0.2
    return -sum(
        ppo((p - t).exp(), a, low, high) / count
        for each, of_each in zip(kept, advantages, strict=True)
        for (p, _, t, _, _), a in zip(each, of_each, strict=True)
    )


def naive_reinforce_pp(groups: Groups, logp: Tensor) -> Tensor:
    """Hu 2025, eq. 6 to 8: reward less the KL of this token and all that follow, normalised over the global batch."""
    pairs = [(tokens(s, logp), r) for group in groups for s, r in graded(group)]
    kept = [each for each, _ in pairs]
    advantages = [[r - 0.1 * sum(t - f for _, _, t, f, _ in e[i:]) for i in range(len(e))] for e, r in pairs]
    return averaged(kept, normalised(advantages), len(every_token(groups, logp)))


def naive_reinforce_pp_baseline(groups: Groups, logp: Tensor) -> Tensor:
    """Hu 2025, eq. 10: less the group's mean, normalised over the global batch; k2 in the loss, β = 0.04."""
    pairs = [(tokens(s, logp), a) for s, a in compared(groups, shifted)]
    kept, every = [each for each, _ in pairs], every_token(groups, logp)
    distance = sum((p - r) ** 2 / 2 / len(every) for p, _, _, r, _ in every)
    return averaged(kept, normalised([[a] * len(each) for each, a in pairs]), len(every)) + 0.04 * distance


def naive_gspo(groups: Groups, logp: Tensor) -> Tensor:
    """Zheng et al. 2025, eq. 5 and 7, with wider bounds."""
    kept = [(tokens(s, logp), a) for s, a in compared(groups, scaled)]
    ratios = [torch.exp(sum(p - t for p, _, t, _, _ in each) / len(each)) for each, _ in kept]  # type: ignore[arg-type]
    return -sum(ppo(s, a, 0.1, 0.1) / completions(groups) for s, (_, a) in zip(ratios, kept, strict=True))


def naive_cispo(groups: Groups, logp: Tensor) -> Tensor:
    """MiniMax-M1 2025, eq. 4: the clipped ratio weighs, and has no gradient."""
    kept = [(tokens(s, logp), a) for s, a in compared(groups, scaled)]
    count = len(every_token(groups, logp))
    return -sum((p - t).exp().clamp(0, 1.3).detach() * a * p / count for each, a in kept for p, _, t, _, _ in each)


def naive_sapo(groups: Groups, logp: Tensor) -> Tensor:
    """Gao et al. 2025, arXiv:2511.20347: 1/G Σ 1/|o_i| Σ of A · 4/τ · σ(τ(ρ − 1)), τ by the sign of A."""
    count, loss = completions(groups), torch.zeros((), dtype=torch.float64)
    for s, a in compared(groups, scaled):
        each, tau = tokens(s, logp), 1.5 if a > 0 else 3.0
        for p, _, t, _, _ in each:
            loss = loss - a * 4 / tau / (1 + torch.exp(-tau * (torch.exp(p - t) - 1))) / len(each) / count
    return loss


def outside(p: float, t: float, a: float, delta: float, kind: str) -> bool:
    """Qi et al. 2026, eq. 12 to 14: a divergence of two outcomes, of tokens that would move further away."""
    mu, pi = math.exp(t), math.exp(p)
    distance = abs(mu - pi) if kind == "tv" else mu * math.log(mu / pi) + others_kl(1 - mu, 1 - pi)
    return distance > delta and (a > 0) == (pi > mu)


def others_kl(mu: float, pi: float) -> float:
    """Of all other tokens together, which are none where the drawn probabilities are 1 or more."""
    if mu <= 0:
        return 0.0
    return mu * math.log(mu / pi) if pi > 0 else math.inf


def naive_dppo(kind: str, delta: float) -> Callable[[Groups, Tensor], Tensor]:
    """Qi et al. 2026, arXiv:2602.04879, eq. 12, as a mean over tokens."""

    def naive(groups: Groups, logp: Tensor) -> Tensor:
        kept = [(p, t, a) for s, a in compared(groups, scaled) for p, _, t, _, _ in tokens(s, logp)]
        masked = [outside(p.item(), t, a, delta, kind) for p, t, a in kept]
        assert 0 < sum(masked) < len(masked)
        gains = ((p - t).exp() * a * (not out) for (p, t, a), out in zip(kept, masked, strict=True))
        return -sum(gain / len(every_token(groups, logp)) for gain in gains)

    return naive


def naive_icepop(groups: Groups, logp: Tensor) -> Tensor:
    """Ring-1T 2025, arXiv:2510.18855, eq. 1: the clipped gain to the trainer's policy before the update, times
    k = π_trainer / π_rollout where 0.9 ≤ k ≤ 1.25, and 0 elsewhere; KL (k3) beside it."""
    kept, count = [(tokens(s, logp), a) for s, a in compared(groups, scaled)], completions(groups)
    loss = torch.zeros((), dtype=torch.float64)
    for each in (tokens(s, logp) for group in groups for s in group):
        loss = loss + sum(0.04 * k3(p, r) / len(each) / count for p, _, _, r, _ in each)
    for each, a in kept:
        for p, b, t, _, _ in each:
            k = math.exp(t - b)
            loss = loss - (k if 0.9 <= k <= 1.25 else 0.0) * ppo((p - t).exp(), a, 0.2, 0.2) / len(each) / count
    return loss


def naive_dapo(groups: Groups, logp: Tensor) -> Tensor:
    """Yu et al. 2025, eq. 8 and 13: a higher upper bound, all tokens of groups that differ, long answers punished."""
    kept = []
    for group in groups:
        pairs = [(s, r + punishment(len(s.rollout.tokens))) for s, r in graded(group)]
        advantages = scaled([r for _, r in pairs])
        if differ(pairs):
            kept += [(tokens(s, logp), a) for (s, _), a in zip(pairs, advantages, strict=True)]
    count = sum(len(each) for each, _ in kept)
    return -sum(ppo((p - t).exp(), a, 0.2, 0.28) / count for each, a in kept for p, _, t, _, _ in each)


def punishment(length: int) -> float:
    """Limit 9, of which the last third is the buffer."""
    return 0.0 if length <= 6 else (6 - length) / 3


def critic_targets(groups: Groups, logp: Tensor) -> tuple[list[Tokens], list[list[float]], list[list[float]]]:
    """GAE written out: A_t = Σ_k (γλ)^k δ_{t+k}, with KL (k1, β = 0.1) in the rewards; and the returns."""
    kept, advantages, goals = [], [], []
    for s, outcome in (pair for group in groups for pair in graded(group)):
        each = tokens(s, logp)
        rewards = [-0.1 * (t - r) for _, _, t, r, _ in each]
        rewards[-1] += outcome
        values = [v for *_, v in each]
        deltas = [rewards[i] + 0.99 * ([*values, 0.0][i + 1]) - values[i] for i in range(len(each))]
        found = [sum((0.99 * 0.9) ** (j - i) * deltas[j] for j in range(i, len(each))) for i in range(len(each))]
        kept.append(each)
        advantages.append(found)
        goals.append([a + v for a, v in zip(found, values, strict=True)])
    return kept, advantages, goals


def naive_ppo(groups: Groups, logp: Tensor) -> Tensor:
    """Schulman et al. 2017, eq. 7, with generalised advantages, normalised."""
    kept, advantages, _ = critic_targets(groups, logp)
    return averaged(kept, normalised(advantages), len(every_token(groups, logp)))


def naive_rsft(groups: Groups, logp: Tensor) -> Tensor:
    """Dong et al. 2023, algorithm 1: likelihood of the best of each group, where one is right."""
    best = []
    for group in groups:
        right = [s for s, reward in graded(group) if reward == 1]
        best += right[:1]
    kept = [tokens(s, logp) for s in best]
    return -sum(p / sum(map(len, kept)) for each in kept for p, *_ in each)


def naive_distill(groups: Groups, logp: Tensor) -> Tensor:
    """Reverse KL to a teacher, token by token, as the advantage: the ungradable teach, too."""
    kept = [tokens(s, logp) for group in groups for s in group]
    count = sum(map(len, kept))
    return -sum(ppo((p - t).exp(), r - t, 0.2, 0.2) / count for each in kept for p, _, t, r, _ in each)


NARROW = {"kind": "mask", "low": 0.9, "high": 1.25}
CASES: dict[str, tuple[RLConfig, Callable[[Groups, Tensor], Tensor]]] = {
    "grpo": (config("grpo", kl_beta=0.04), naive_grpo),
    "grpo of the paper": (config("grpo", aggregation="sequences"), naive_grpo_of_the_paper),
    "dr_grpo": (config("dr_grpo"), naive_dr_grpo),
    "rloo": (config("rloo", kl_beta=0.1), naive_rloo),
    "reinforce_pp": (config("reinforce_pp", kl_beta=0.1), naive_reinforce_pp),
    "reinforce_pp_baseline": (config("reinforce_pp_baseline", kl_beta=0.04), naive_reinforce_pp_baseline),
    "gspo": (config("gspo", clip_low=0.1, clip_high=0.1, epochs=2), naive_gspo),
    "gspo token": (config("gspo", ratio="sequence_token", clip_low=0.1, clip_high=0.1, epochs=2), naive_gspo),
    "cispo": (config("cispo", clip_high=0.3), naive_cispo),
    "sapo": (config("sapo", tau_pos=1.5, tau_neg=3.0), naive_sapo),
    "dppo": (config("dppo", clip_low=0.05, clip_high=0.05), naive_dppo("tv", 0.05)),
    "dppo by kl": (config("dppo", divergence="kl", clip_low=0.02, clip_high=0.02), naive_dppo("kl", 0.02)),
    "icepop": (config("icepop", kl_beta=0.04, epochs=2, correction=NARROW), naive_icepop),
    "dapo": (config("dapo", overlong_share=1 / 3), naive_dapo),
    "ppo": (config("ppo", kl_beta=0.1, discount=0.99, gae_trace=0.9), naive_ppo),
    "rsft": (config("rsft"), naive_rsft),
    "distill": (config("distill"), naive_distill),
}


def test_every_method_is_compared() -> None:
    assert {each.method for each, _ in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_loss_and_gradient_are_those_of_the_paper(name: str, seed: int) -> None:
    chosen, naive = CASES[name]
    groups = groups_of(seed)
    logp = policy_of(groups, seed)
    loss, report = total(samples_from(groups, chosen), logp, chosen.objective)
    expected = naive(groups, logp)
    (found,) = torch.autograd.grad(loss, logp)
    (wanted,) = torch.autograd.grad(expected, logp)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert report["loss"] == pytest.approx(loss.item(), abs=1e-6)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_neither_rows_nor_ranks_change_a_number(name: str) -> None:
    chosen, _ = CASES[name]
    groups = groups_of(7)
    logp = policy_of(groups, 7)
    samples = samples_from(groups, chosen)
    whole, report = total(samples, logp, chosen.objective, budget=1000)
    (wanted,) = torch.autograd.grad(whole, logp)
    for budget, ranks in ((1, 1), (30, 1), (1000, 2), (20, 3)):
        loss, other = total(samples, logp, chosen.objective, budget=budget, ranks=ranks)
        np.testing.assert_allclose(torch.autograd.grad(loss, logp)[0], wanted, atol=1e-7)
        for key in report:
            assert other[key] == pytest.approx(report[key], rel=1e-5, abs=1e-6), key


def test_the_critic_learns_the_returns() -> None:
    """½ (v − R)² with values clipped around the old ones, over all tokens."""
    chosen, _ = CASES["ppo"]
    groups = groups_of(3)
    values = policy_of(groups, 3)
    loss, _ = total(samples_from(groups, chosen), values, chosen.critic_loss)
    kept, _, goals = critic_targets(groups, values)
    count = len(every_token(groups, values))
    expected = torch.zeros((), dtype=torch.float64)
    for each, of_each in zip(kept, goals, strict=True):
        for (v, _, _, _, old), goal in zip(each, of_each, strict=True):
            near = old + (v - old).clamp(-0.2, 0.2)
            expected = expected + torch.maximum((v - goal) ** 2, (near - goal) ** 2) / 2 / count
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found, wanted = (torch.autograd.grad(value, values)[0] for value in (loss, expected))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(("kind", "level"), [(k, n) for k in ("truncate", "mask") for n in ("token", "sequence")])
def test_corrections_weigh_by_trainer_over_rollout(kind: str, level: str) -> None:
    """Truncated and masked importance sampling; with no bound this is decoupled PPO (Hilton et al. 2021, eq. 3)."""
    low, high = (0.9, 1.1) if level == "token" else (0.5, 1.1)
    rule = {"kind": kind, "level": level, "high": high} | ({"low": low} if kind == "mask" else {})
    chosen = config("grpo", proximal="trainer", epochs=2, correction=rule)
    groups = groups_of(5)
    logp = policy_of(groups, 5)
    kept = [(tokens(s, logp), a) for s, a in compared(groups, scaled)]
    count = len(every_token(groups, logp))
    expected, weights = torch.zeros((), dtype=torch.float64), []
    for each, a in kept:
        whole = math.exp(sum(t - b for _, b, t, _, _ in each))
        for p, b, t, _, _ in each:
            ratio = math.exp(t - b) if level == "token" else whole
            weights.append(min(ratio, high) if kind == "truncate" else ratio * (low <= ratio <= high))
            expected = expected - weights[-1] * ppo((p - t).exp(), a, 0.2, 0.2) / count
    assert len({w in (0, high) for w in weights}) == 2
    loss, report = total(samples_from(groups, chosen), logp, chosen.objective)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert report["correction"] == pytest.approx(mean(weights), rel=1e-5)
    found, wanted = (torch.autograd.grad(value, logp)[0] for value in (loss, expected))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_with_one_update_the_trainer_itself_is_where_ratios_start() -> None:
    chosen = config("grpo", proximal="trainer", correction={"high": None})
    groups = groups_of(5)
    logp = policy_of(groups, 5)
    kept = [(tokens(s, logp), a) for s, a in compared(groups, scaled)]
    count = len(every_token(groups, logp))
    expected = -sum((p - b).exp().detach() * a * p / count for each, a in kept for p, b, _, _, _ in each)
    loss, report = total(samples_from(groups, chosen), logp, chosen.objective)
    found, wanted = (torch.autograd.grad(value, logp)[0] for value in (loss, expected))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert report["clipped"] == 0


@pytest.mark.parametrize("epochs", [1, 2])
def test_gspo_clips_no_noise_of_the_rollouts(epochs: int) -> None:
    """Bounds of 3e-4 and 4e-4 are of the trainer's own ratios; log-probabilities of rollouts are 0.01 from these."""
    draw, groups = np.random.default_rng(0), []
    for group in groups_of(4, masked=False):
        noisy = []
        for s in group:
            own = np.asarray(s.rollout.logp, np.float32)
            reported = tuple((own + floats(draw, len(own), 0.01)).tolist())
            known = replace(s.estimates, proximal_logp=own)
            noisy.append(replace(s, rollout=replace(s.rollout, logp=reported), estimates=known))
        groups.append(noisy)
    own = np.concatenate([s.estimates.proximal_logp for group in groups for s in group])
    shares = []
    for chosen in (config("gspo", epochs=epochs), config("gspo", proximal="rollout", epochs=epochs)):
        plain = [[s if chosen.scores else replace(s, estimates=Estimates()) for s in group] for group in groups]
        _, report = total(samples_from(plain, chosen), torch.from_numpy(own).requires_grad_(), chosen.objective)
        shares.append(report["clipped"])
    assert shares[0] == 0
    assert shares[1] > 0.5
    assert config("gspo").scores == frozenset(), "with one update a step no model is asked for it"
    assert config("gspo", epochs=2).scores == {"proximal"}


def test_dual_clip_bounds_the_loss_of_bad_tokens() -> None:
    """Ye et al. 2020, eq. 5: where A < 0 the gain is at least cA."""
    chosen = config("grpo", clip_dual=1.5)
    groups = groups_of(5)
    logp = policy_of(groups, 5)
    kept = [(tokens(s, logp), a) for s, a in compared(groups, scaled)]
    count = len(every_token(groups, logp))
    gains = [(ppo((p - t).exp(), a, 0.2, 0.2), a) for each, a in kept for p, _, t, _, _ in each]
    assert any(a < 0 and gain < 1.5 * a for gain, a in gains)
    expected = -sum(torch.clamp_min(gain, 1.5 * a) if a < 0 else gain for gain, a in gains) / count
    loss, _ = total(samples_from(groups, chosen), logp, chosen.objective)
    found, wanted = (torch.autograd.grad(value, logp)[0] for value in (loss, expected))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_icepop_is_grpo_with_its_mask() -> None:
    """With the constants of Ring-1T (§2.3.4), and with one update a step from the trainer itself."""
    named = config("icepop")
    mask = {"kind": "mask", "level": "token", "low": 0.5, "high": 5.0}
    spelled = config("grpo", aggregation="sequences", proximal="trainer", correction=mask)
    assert named.objective == spelled.objective
    assert named.aggregation == spelled.aggregation
    assert named.scores == frozenset(), "with one update a step no model is asked for log-probabilities"


def test_keys_of_a_recipe_override_its_method() -> None:
    assert config("dapo").clip_high == 0.28
    assert config("dapo", clip_high=0.3).clip_high == 0.3
    assert config("dr_grpo").advantage == "dr_grpo"
    assert config("dr_grpo", advantage="grpo").aggregation == "constant"
    assert config("ppo").scores == {"value"}
    assert config("ppo", kl_beta=0.1, proximal="trainer", epochs=2).scores == {"value", "reference", "proximal"}
    written_out = config("gspo").model_dump()
    assert RLConfig.model_validate(written_out) == config("gspo")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"kl_beta": 0.1, "kl_estimator": "k1"}, "gradient whose mean is 0"),
        ({"group_size": 1}, "2 or more"),
        ({"kl_beta": 0.1, "reference": {"kind": "none"}}, "keep a reference"),
    ],
)
def test_what_cannot_learn_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config("grpo", **keys)


@pytest.mark.parametrize("aggregation", ["tokens", "sequences", "constant"])
def test_metrics_are_of_tokens_in_any_aggregation(aggregation: str) -> None:
    """So that beta follows the same KL."""
    groups = groups_of(5)
    logp = policy_of(groups, 5)
    every = every_token(groups, logp)
    chosen = config("grpo", aggregation=aggregation, kl_beta=0.1, kl_target=0.02)
    for budget, ranks in ((1000, 1), (20, 3)):
        _, report = total(samples_from(groups, chosen), logp, chosen.objective, budget=budget, ranks=ranks)
        expected = {
            "kl": mean([k3(p, r).item() for p, _, _, r, _ in every]),
            "clipped": mean([float(not 0.8 <= math.exp(p.item() - t) <= 1.2) for p, _, t, _, _ in every]),
            "mismatch_mean": mean([abs(p.item() - b) for p, b, *_ in every]),
            "mismatch_kl": mean([math.exp(p.item() - b) - 1 - (p.item() - b) for p, b, *_ in every]),
        }
        for name, value in expected.items():
            assert report[name] == pytest.approx(value, rel=1e-5), name


def test_beta_follows_its_target() -> None:
    """Ziegler et al. 2019, §2.2."""
    chosen = config("grpo", kl_beta=0.1, kl_target=0.02)
    assert chosen.adapted(0.021).kl_beta == pytest.approx(0.1 * (1 + 0.1 * 0.05))
    assert chosen.adapted(1.0).kl_beta == pytest.approx(0.1 * 1.02)
    assert chosen.adapted(0.0).objective.kl.beta == pytest.approx(0.1 * 0.98)
    assert config("grpo", kl_beta=0.1).adapted(1.0).kl_beta == 0.1


def test_preferences_have_objectives() -> None:
    chosen = PreferenceConfig(method="dpo", beta=0.3, smoothing=0.1)
    assert (chosen.objective.kind, chosen.objective.beta, chosen.objective.smoothing) == ("sigmoid", 0.3, 0.1)
    assert PreferenceConfig(method="reward_model").objective.beta == 1


@pytest.mark.parametrize("name", ["grpo", "rloo", "gspo"])
def test_advantages_of_whole_rollouts_take_no_memory_for_tokens(name: str) -> None:
    length, count = 50_000, 20
    prompt, logp = Prompt(0, "", (1,), ""), np.zeros(length, np.float32)
    group = []
    for number in range(count):
        rollout = Rollout(number, range(length), logp, "", "stop", np.zeros(length), prompt=prompt)  # type: ignore[arg-type]
        verdict = Verdict((Outcome.correct, Outcome.incorrect)[number % 2])
        known = Estimates(logp, logp, logp)
        group.append(Estimated(rollout, verdict, reward_of(Judged(rollout, verdict), RewardConfig()), known))
    tracemalloc.start()
    samples = samples_from([group], config(name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(samples) == count
    assert peak < length * count, "less than a byte a token"
