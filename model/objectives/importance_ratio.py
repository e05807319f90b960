"""Importance sampling ratios between policies: per token or sequence, clipped, gated, masked and corrected.

There are three policies: π is being trained; the *proximal* policy is the one that π is clipped to, where the update
started; the *behaviour* policy sampled the tokens. Where the last two differ, because rollouts compute otherwise or are
stale, their ratio corrects the expectation while the clip bounds the step (decoupled PPO, Hilton et al. 2021, eq. 3).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lockstep.model.objectives.objective import SampleInputs

Level = Literal["token", "sequence", "sequence_token"]
Divergence = Literal["tv", "kl"]


@dataclass(frozen=True)
class Clip:
    """Bounds of the importance ratio: [1 − low, 1 + high] (PPO, Schulman et al. 2017, eq. 7); or of `diverged`."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    """Where the advantage A is negative, the gain is at least dual · A (Ye et al. 2020, eq. 5); above 1."""


@dataclass(frozen=True)
class Gate:
    """Temperatures τ of SAPO's soft gate (Gao et al. 2025): the higher, the sooner a ratio off 1 has no gradient."""

    positive: float = 1.0
    """Where the advantage is above 0."""
    negative: float = 1.05
    """Elsewhere."""


@dataclass(frozen=True)
class Correction:
    """Importance weights π_proximal / π_behaviour of tokens, truncated at a bound, or masked where out of bounds."""

    kind: Literal["truncate", "mask"] = "truncate"
    level: Literal["token", "sequence"] = "token"
    """Of each token, or one product of all of a sample's."""
    low: float = 0.0
    """A mask drops weights below."""
    high: float = math.inf
    """Truncation caps weights at it; a mask drops weights above."""


def ratio(delta_K: Tensor, samples: SampleInputs, level: Level) -> Tensor:
    """The importance ratio π / π_proximal of each token, [K], from the difference δ of log-probabilities.

    token: exp(δ_t). sequence: exp(mean of δ over the sample), GSPO's s_i (Zheng et al. 2025, eq. 7).
    sequence_token: the same value, whose gradient at a token is s_i · ∇ log π_t alone (GSPO-token, eq. 14).
    """
    if level == "token":
        return delta_K.exp()
    mean = samples.sums(delta_K if level == "sequence" else delta_K.detach()) / samples.counted_S.clamp_min(1)
    of_sample = samples.of_tokens(mean)
    return (of_sample if level == "sequence" else of_sample + delta_K - delta_K.detach()).exp()


def bounded(ratio_K: Tensor, clip: Clip) -> Tensor:
    """The ratio clipped to [1 − low, 1 + high]."""
    return ratio_K.clamp(1 - clip.low, 1 + clip.high)


def gated(ratio_K: Tensor, advantage_K: Tensor, gate: Gate) -> Tensor:
    """The soft gate 4/τ · σ(τ(ρ − 1)) of each ratio, [K] (SAPO, Gao et al. 2025, arXiv:2511.20347).

    Its derivative by ρ is 4p(1 − p) with p = σ(τ(ρ − 1)): 1 at ρ = 1, and smoothly less on both sides.
    """
    tau = torch.where(advantage_K > 0, gate.positive, gate.negative).to(ratio_K.dtype)
    return 4 / tau * torch.sigmoid(tau * (ratio_K - 1))


@torch.no_grad()
def binary_divergence(logp_K: Tensor, proximal_logp_K: Tensor, kind: Divergence) -> Tensor:
    """Divergence of π from the proximal policy μ at each token, [K], with two outcomes: that token or any other.

    tv: |μ − π|. kl: KL(μ‖π) in nats; infinite where π is 1 and μ is not. (DPPO, Qi et al. 2026, arXiv:2602.04879,
    eq. 13 and 14.) Either is at most that of the distributions over the whole vocabulary.
    """
    mu = proximal_logp_K.exp()
    if kind == "tv":
        return (mu - logp_K.exp()).abs()
    others_mu, others_pi = (-torch.expm1(logp).clamp_max(0) for logp in (proximal_logp_K, logp_K))
    return mu * (proximal_logp_K - logp_K) + torch.xlogy(others_mu, others_mu) - torch.xlogy(others_mu, others_pi)


@torch.no_grad()
def diverged(logp_K: Tensor, proximal_logp_K: Tensor, advantage_K: Tensor, clip: Clip, kind: Divergence) -> Tensor:
    """Which tokens lie beyond the trust region and would move further away, [K] (DPPO, Qi et al. 2026, eq. 12).

    Those whose divergence is above `clip.high` where the advantage and log ρ are positive, and above `clip.low` where
    both are negative.
    """
    distance = binary_divergence(logp_K, proximal_logp_K, kind)
    rises, falls = logp_K > proximal_logp_K, logp_K < proximal_logp_K
    too_high = (advantage_K > 0) & rises & (distance > clip.high)
    return too_high | ((advantage_K < 0) & falls & (distance > clip.low))


@torch.no_grad()
def corrected(old_logp_K: Tensor, proximal_logp_K: Tensor, samples: SampleInputs, rule: Correction) -> Tensor:
    """The correction weight of each token, [K], for the policy that sampled it; without a gradient."""
    gap = proximal_logp_K - old_logp_K
    if rule.level == "sequence":
        gap = samples.of_tokens(samples.sums(gap))
    weight = gap.exp()
    if rule.kind == "truncate":
        return weight.clamp_max(rule.high)
    return torch.where((weight >= rule.low) & (weight <= rule.high), weight, torch.zeros_like(weight))
