"""Objectives against their formulas, token by token."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.model.objectives.importance_ratio import Clip, Correction, Gate, binary_divergence, diverged, gated
from lockstep.model.objectives.kl import KL
from lockstep.model.objectives.mismatch import differing_bits, mismatch_metrics
from lockstep.model.objectives.objective import LossInputs, SampleInputs
from lockstep.model.objectives.token_loss import TokenLoss, nll
from lockstep.model.objectives.value_loss import ValueLoss

CLIP = Clip(0.2, 0.3)


def columns(tokens: int, seed: int, spread: float) -> tuple[Tensor, LossInputs]:
    """Log-probabilities whose ratios to the old ones leave the bounds on both sides, advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(tokens, generator=generator)

    logp = -normal().abs()
    weight = torch.rand(tokens, generator=generator) / tokens
    advantage, old, reference = normal(), logp + spread * normal(), logp + 0.5 * normal()
    return logp.requires_grad_(), columns_from(weight, advantage, old, reference)


def columns_from(weight: Tensor, advantage: Tensor, old: Tensor, reference: Tensor) -> LossInputs:
    """All tokens are of one sample, and ratios are to the rollout's policy."""
    zeros, number = torch.zeros_like(weight), torch.zeros(len(weight), dtype=torch.int64)
    one = SampleInputs(number, torch.tensor([len(weight)]), weight.mean()[None], torch.zeros(1), torch.zeros(1))
    return LossInputs(weight, advantage, old, old, reference, zeros, zeros, one)


def grpo(kl_beta: float, *, has_reference: bool = True) -> TokenLoss:
    return TokenLoss(clip=CLIP, kl=KL(kl_beta), has_reference=has_reference)


def naive_loss(logp: Tensor, c: LossInputs, kl_beta: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(logp)):
        p, w, a, old, r = (t[i].double() for t in (logp, c.weight, c.advantage, c.old_logp, c.reference_logp))
        ratio = torch.exp(p - old)
        free = ratio * a
        if ratio > 1 + CLIP.high:
            gain = torch.minimum(free, (1 + CLIP.high) * a)
        elif ratio < 1 - CLIP.low:
            gain = torch.minimum(free, (1 - CLIP.low) * a)
        else:
            gain = free
        total = total - w * (gain - kl_beta * (torch.exp(r - p) - (r - p) - 1))
    return total


@pytest.mark.parametrize("kl_beta", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(3))
def test_token_loss_is_grpo(seed: int, kl_beta: float) -> None:
    logp, c = columns(60, seed, 0.5)
    loss, report = grpo(kl_beta)(logp, c)
    expected = naive_loss(logp, c, kl_beta)
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)
    assert math.isclose(report["loss"].item(), loss.item())
    (found,) = torch.autograd.grad(loss, logp)
    (wanted,) = torch.autograd.grad(expected, logp)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-7)
    if kl_beta == 0:  # something is clipped and something is not, so both branches were compared
        assert 0 < (found == 0).sum() < len(found)


def test_reports_of_token_loss() -> None:
    logp, c = columns(60, 4, 0.5)
    _, report = grpo(0.1)(logp, c)
    p, old, r = (t.detach().double() for t in (logp, c.old_logp, c.reference_logp))
    ratio = (p - old).exp()
    expected = {
        "kl": ((r - p).exp() - (r - p) - 1).mean(),
        "clipped": ((ratio > 1.3) | (ratio < 0.8)).double().mean(),
        "ratio_max": (ratio - 1).abs().max(),
        "mismatch_mean": (p - old).abs().mean(),
        "mismatch_max": (p - old).abs().max(),
        "mismatch_kl": ((p - old).exp() - (p - old) - 1).mean(),
        "mismatch_bits": torch.tensor(bits_between(logp, c.old_logp)),
    }
    for name, value in expected.items():
        assert math.isclose(metric(report[name]), value.item(), rel_tol=1e-4), name
        assert not report[name].requires_grad


def metric(found: Tensor) -> float:
    """A report of two numbers is a sum and a count."""
    return (found[0] / found[1].clamp_min(1) if found.dim() else found).item()


SCALES = {"tokens": 1.0, "constant of 7": 1 / 7, "uneven": torch.linspace(0.1, 3.0, 60)}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_metrics_do_not_depend_on_the_weights(scale: float | Tensor) -> None:
    logp, c = columns(60, 4, 0.5)
    rule = TokenLoss(clip=CLIP, kl=KL(0.1), correction=Correction(high=1.1), entropy=0.1)
    silent = torch.arange(60) % 4 == 0
    weight = torch.where(silent, 0.0, torch.ones(60) / 60)
    entropy = torch.linspace(0, 2, 60)
    given = replace(c, weight=weight, entropy=entropy, old_logp=c.old_logp + 0.1)
    wanted, found = (rule(logp, replace(given, weight=w))[1] for w in (weight, weight * scale))
    assert metric(wanted["entropy"]) == pytest.approx(entropy[~silent].mean().item(), rel=1e-6)
    for name in wanted.keys() - {"loss"}:
        assert metric(found[name]) == metric(wanted[name]), name
    values = torch.linspace(-1, 1, 60)
    _, critic = ValueLoss(0.1)(values, replace(given, weight=weight * scale, returns=c.advantage))
    assert metric(critic["value"]) == pytest.approx(values[~silent].mean().item(), abs=1e-6)
    assert 0 < metric(critic["value_clipped"]) < 1


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    logp, c = columns(40, 1, 0.0)
    loss, report = grpo(0.0)(logp, c)
    (found,) = torch.autograd.grad(loss, logp)
    (wanted,) = torch.autograd.grad(nll(logp, c)[0], logp)
    assert torch.equal(found, wanted)
    assert torch.allclose(found, -c.weight * c.advantage)
    assert metric(report["clipped"]) == 0
    assert all(metric(report[f"mismatch_{name}"]) == 0 for name in ("mean", "max", "kl", "bits"))


def bits_between(a: torch.Tensor, b: torch.Tensor) -> int:
    x, y = (t.detach().numpy().view(np.uint32) for t in (a, b))
    return sum(bin(int(i) ^ int(j)).count("1") for i, j in zip(x, y, strict=True))


def test_all_32_bits_count() -> None:
    numbers = torch.tensor([0.0, -0.0, 1.0, -3.5, torch.inf, torch.nan])
    for other in (numbers.roll(1), -numbers, numbers * 1.0000001):
        assert differing_bits(numbers, other) == bits_between(numbers, other)
    assert differing_bits(numbers, -numbers) >= 6


def test_tokens_that_weigh_nothing_have_no_mismatch() -> None:
    logp, c = columns(5, 4, 0.5)
    report = mismatch_metrics(logp, replace(c, weight=torch.zeros(5)))
    assert all(metric(value) == 0 for value in report.values())


def test_no_reference_means_no_kl() -> None:
    logp, c = columns(10, 2, 0.1)
    plain, report = grpo(0.7, has_reference=False)(logp, c)
    assert plain == grpo(0.0)(logp, c)[0]
    assert "kl" not in report


@pytest.mark.parametrize("reference", [-3.0, -1.0, -0.1])
def test_k3_is_zero_only_at_the_reference_and_never_negative(reference: float) -> None:
    logp = torch.linspace(-4, 0, 41)
    ones = torch.ones(1)
    rows = [columns_from(ones, ones, p[None], ones * reference) for p in logp]
    values = [metric(grpo(1.0)(p[None], c)[1]["kl"]) for p, c in zip(logp, rows, strict=True)]
    assert min(values) >= 0
    assert abs(logp[values.index(min(values))].item() - reference) < 0.051


def test_a_row_without_predictions_has_a_loss_of_zero_that_has_a_gradient() -> None:
    logp, c = columns(0, 0, 0.0)
    for loss, report in (nll(logp, c), grpo(0.1)(logp, c)):
        loss.backward()
        assert loss == 0
        assert all(metric(value) == 0 for value in report.values())


@pytest.mark.parametrize("parts", [2, 5])
def test_losses_of_micro_batches_add_up(parts: int) -> None:
    logp, c = columns(30, 3, 0.4)
    whole = grpo(0.1)(logp, c)[0]
    split = [
        columns_from(*(getattr(c, n).chunk(parts)[i] for n in ("weight", "advantage", "old_logp", "reference_logp")))
        for i in range(parts)
    ]
    sums = [grpo(0.1)(p, s)[0] for p, s in zip(logp.chunk(parts), split, strict=True)]
    assert math.isclose(sum(s.item() for s in sums), whole.item(), rel_tol=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gate_has_the_slope_of_sapo(advantage: float) -> None:
    """4p(1 − p) at p = σ(τ(ρ − 1)): 1 where the policies agree, and less the further they are apart."""
    ratio, gate = torch.linspace(0.1, 6.0, 60, dtype=torch.float64).requires_grad_(), Gate(1.0, 2.0)
    tau = gate.positive if advantage > 0 else gate.negative
    (slope,) = torch.autograd.grad(gated(ratio, torch.full((60,), advantage), gate).sum(), ratio)
    p = 1 / (1 + (-tau * (ratio.detach() - 1)).exp())
    assert torch.allclose(slope, 4 * p * (1 - p), rtol=1e-12)
    assert slope.argmax() == (ratio - 1).abs().argmin()
    assert torch.allclose(gated(torch.ones(1), torch.tensor([advantage]), gate), torch.tensor([2 / tau]))


LOGP = torch.tensor([0.0, -1e-7, -1e-3, -0.7, -5.0, -60.0, -1e4])
"""Of tokens that are certain, and of some that no number in fp32 is small enough for."""


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_divergences_of_certain_and_of_impossible_tokens_are_numbers(kind: str) -> None:
    now, before = LOGP.repeat(len(LOGP)), LOGP.repeat_interleave(len(LOGP))
    found = binary_divergence(now, before, kind)  # type: ignore[arg-type]
    assert not found.isnan().any()
    assert (found >= -1e-6).all()
    assert (found[now == before] == 0).all()
    assert found.isinf().any() == (kind == "kl"), "certain now, and not before"
    p, mu = now.double(), before.double()
    plain = torch.isfinite(found) & (before < 0) & (now < 0)
    others = (-torch.expm1(mu)) * ((-torch.expm1(mu)).log() - (-torch.expm1(p)).log())
    wanted = (mu.exp() - p.exp()).abs() if kind == "tv" else mu.exp() * (mu - p) + others
    assert torch.allclose(found[plain].double(), wanted[plain], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("seed", range(3))
def test_divergences_of_two_outcomes_are_at_most_those_of_the_vocabulary(kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mu, pi = (torch.randn(50, 12, generator=generator).mul(2).log_softmax(1) for _ in range(2))
    token = torch.randint(12, (50, 1), generator=generator)
    found = binary_divergence(pi.gather(1, token)[:, 0], mu.gather(1, token)[:, 0], kind)  # type: ignore[arg-type]
    whole = (mu.exp() - pi.exp()).abs().sum(1) / 2 if kind == "tv" else (mu.exp() * (mu - pi)).sum(1)
    assert (found <= whole + 1e-5).all()
    assert (found > 0.01 * whole).any()


def test_a_rare_token_may_multiply_its_probability_and_a_likely_one_may_not_lose_it() -> None:
    """The example of Qi et al. 2026, §4.2: ratios of 100 and 0.81, of which PPO's clip bounds the first alone."""
    before, now = torch.tensor([1e-4, 0.99]).log(), torch.tensor([1e-2, 0.80]).log()
    clip = Clip(0.15, 0.15)
    assert diverged(now, before, torch.tensor([1.0, -1.0]), clip, "tv").tolist() == [False, True]
    assert diverged(now, before, torch.tensor([1.0, 1.0]), clip, "tv").tolist() == [False, False], "it comes back"
    assert diverged(now, before, torch.tensor([-1.0, -1.0]), clip, "kl").tolist() == [False, True]


def test_dppo_drops_the_gradient_of_what_diverged_and_says_how_much() -> None:
    logp, c = columns(60, 5, 0.5)
    rule = TokenLoss(gain="dppo", clip=Clip(0.05, 0.1))
    c = replace(c, proximal_logp=c.proximal_logp.clamp_max(-1e-3))
    loss, report = rule(logp, c)
    masked = diverged(logp.detach(), c.proximal_logp, c.advantage, rule.clip, "tv")
    (found,) = torch.autograd.grad(loss, logp)
    wanted = -c.weight * c.advantage * (logp.detach() - c.proximal_logp).exp()
    assert torch.equal(found[masked], torch.zeros(int(masked.sum())))
    assert torch.allclose(found[~masked], wanted[~masked], rtol=1e-6)
    assert 0 < masked.sum() < 60
    assert metric(report["clipped"]) == pytest.approx(masked.float().mean().item())


def test_a_gate_has_no_bounds_to_report() -> None:
    logp, c = columns(20, 5, 0.5)
    _, report = TokenLoss(gain="sapo")(logp, c)
    assert "clipped" not in report
    assert metric(report["ratio_max"]) > 0.1
