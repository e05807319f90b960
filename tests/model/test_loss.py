"""Objectives against their formulas, token by token."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.model.loss import Clip, Columns, differing_bits, mismatch, nll, token_loss

CLIP = Clip(0.2, 0.3)


def columns(tokens: int, seed: int, spread: float) -> tuple[Tensor, Columns]:
    """Log-probabilities whose ratios to the old ones leave the bounds on both sides, advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(tokens, generator=generator)

    logp = -normal().abs()
    weight = torch.rand(tokens, generator=generator) / tokens
    return logp.requires_grad_(), Columns(
        weight, normal(), logp.detach() + spread * normal(), logp.detach() + 0.5 * normal()
    )


def naive_loss(logp: Tensor, c: Columns, kl_beta: float) -> Tensor:
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
    loss, report = token_loss(logp, c, clip=CLIP, kl_beta=kl_beta, has_reference=True)
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
    _, report = token_loss(logp, c, clip=CLIP, kl_beta=0.1, has_reference=True)
    p, old, r, w = (t.detach().double() for t in (logp, c.old_logp, c.reference_logp, c.weight))
    ratio = (p - old).exp()
    expected = {
        "kl": (w * ((r - p).exp() - (r - p) - 1)).sum(),
        "clipped": (w * ((ratio > 1.3) | (ratio < 0.8))).sum(),
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
    loss, report = token_loss(logp, c, clip=CLIP, kl_beta=0.0, has_reference=True)
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
    report = mismatch(logp, replace(c, weight=torch.zeros(5)))
    assert all(value == 0 for value in report.values())


def test_no_reference_means_no_kl() -> None:
    logp, c = columns(10, 2, 0.1)
    plain, report = token_loss(logp, c, clip=CLIP, kl_beta=0.7, has_reference=False)
    assert plain == token_loss(logp, c, clip=CLIP, kl_beta=0.0, has_reference=True)[0]
    assert report["kl"] == 0


@pytest.mark.parametrize("reference", [-3.0, -1.0, -0.1])
def test_k3_is_zero_only_at_the_reference_and_never_negative(reference: float) -> None:
    logp = torch.linspace(-4, 0, 41)
    ones = torch.ones(1)
    values = [
        token_loss(p[None], Columns(ones, ones, p[None], ones * reference), clip=CLIP, kl_beta=1, has_reference=True)[
            1
        ]["kl"].item()
        for p in logp
    ]
    assert min(values) >= 0
    assert abs(logp[values.index(min(values))].item() - reference) < 0.051


def test_a_row_without_predictions_has_a_loss_of_zero_that_has_a_gradient() -> None:
    logp, c = columns(0, 0, 0.0)
    for loss, report in (nll(logp, c), token_loss(logp, c, clip=CLIP, kl_beta=0.1, has_reference=True)):
        loss.backward()
        assert loss == 0
        assert all(value == 0 for value in report.values())


@pytest.mark.parametrize("parts", [2, 5])
def test_losses_of_micro_batches_add_up(parts: int) -> None:
    logp, c = columns(30, 3, 0.4)
    whole = token_loss(logp, c, clip=CLIP, kl_beta=0.1, has_reference=True)[0]
    names = ("weight", "advantage", "old_logp", "reference_logp")
    split = [Columns(*(getattr(c, n).chunk(parts)[i] for n in names)) for i in range(parts)]
    sums = [
        token_loss(p, s, clip=CLIP, kl_beta=0.1, has_reference=True)[0]
        for p, s in zip(logp.chunk(parts), split, strict=True)
    ]
    assert math.isclose(sum(s.item() for s in sums), whole.item(), rel_tol=1e-5)
