"""Objectives against their formulas, token by token."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.model.objectives.importance_ratio import Clip
from lockstep.model.objectives.kl import KL
from lockstep.model.objectives.mismatch import differing_bits, mismatch_metrics
from lockstep.model.objectives.objective import LossInputs, SampleInputs
from lockstep.model.objectives.token_loss import TokenLoss, nll

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
    p, old, r, w = (t.detach().double() for t in (logp, c.old_logp, c.reference_logp, c.weight))
    ratio = (p - old).exp()
    expected = {
        "kl": (w * ((r - p).exp() - (r - p) - 1)).sum(),
        "clipped": (w * ((ratio > 1.3) | (ratio < 0.8))).sum(),
        "ratio_max": (ratio - 1).abs().max(),
        "mismatch_mean": (w * (p - old).abs()).sum(),
        "mismatch_max": (p - old).abs().max(),
        "mismatch_kl": (w * ((p - old).exp() - (p - old) - 1)).sum(),
        "mismatch_bits": torch.tensor(bits_between(logp, c.old_logp)),
    }
    for name, value in expected.items():
        assert math.isclose(report[name].item(), value.item(), rel_tol=1e-4), name
        assert not report[name].requires_grad


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    logp, c = columns(40, 1, 0.0)
    loss, report = grpo(0.0)(logp, c)
    (found,) = torch.autograd.grad(loss, logp)
    (wanted,) = torch.autograd.grad(nll(logp, c)[0], logp)
    assert torch.equal(found, wanted)
    assert torch.allclose(found, -c.weight * c.advantage)
    assert report["clipped"] == 0
    assert all(report[f"mismatch_{name}"] == 0 for name in ("mean", "max", "kl", "bits"))


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
    assert all(value == 0 for value in report.values())


def test_no_reference_means_no_kl() -> None:
    logp, c = columns(10, 2, 0.1)
    plain, report = grpo(0.7, has_reference=False)(logp, c)
    assert plain == grpo(0.0)(logp, c)[0]
    assert report["kl"] == 0


@pytest.mark.parametrize("reference", [-3.0, -1.0, -0.1])
def test_k3_is_zero_only_at_the_reference_and_never_negative(reference: float) -> None:
    logp = torch.linspace(-4, 0, 41)
    ones = torch.ones(1)
    rows = [columns_from(ones, ones, p[None], ones * reference) for p in logp]
    values = [grpo(1.0)(p[None], c)[1]["kl"].item() for p, c in zip(logp, rows, strict=True)]
    assert min(values) >= 0
    assert abs(logp[values.index(min(values))].item() - reference) < 0.051


def test_a_row_without_predictions_has_a_loss_of_zero_that_has_a_gradient() -> None:
    logp, c = columns(0, 0, 0.0)
    for loss, report in (nll(logp, c), grpo(0.1)(logp, c)):
        loss.backward()
        assert loss == 0
        assert all(value == 0 for value in report.values())


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
