"""Importance sampling ratios between policies: per token or sequence, clipped, and corrected for the behaviour policy.

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


@dataclass(frozen=True)
class Clip:
    """Bounds of the importance ratio: [1 − low, 1 + high] (PPO, Schulman et al. 2017, eq. 7)."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    """Where the advantage A is negative, the gain is at least dual · A (Ye et al. 2020, eq. 5); above 1."""


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
