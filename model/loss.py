"""Objectives: pure functions from the policy's per-token log-probabilities and a batch's columns to a loss.

Sums run over the selected tokens of a micro-batch; the weight column already divides by the size of the global batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """The columns of the K tokens that count, in fp32."""

    weight: Tensor
    advantage: Tensor
    old_logp: Tensor
    reference_logp: Tensor


Objective = Callable[[Tensor, Columns], tuple[Tensor, dict[str, Tensor]]]
"""The loss of a micro-batch, and what it reports, from log-probabilities and columns."""


@dataclass(frozen=True)
class Clip:
    """Bounds of the importance ratio: [1 − low, 1 + high] (PPO, Schulman et al. 2017, eq. 7)."""

    low: float = 0.2
    high: float = 0.2


def nll(logp_K: Tensor, columns: Columns) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted negative log-likelihood in nats: pretraining, SFT, and REINFORCE where advantages differ from 1."""
    loss = -(columns.weight * columns.advantage * logp_K).sum()
    return loss, {"loss": loss}


def token_loss(
    logp_K: Tensor, columns: Columns, *, clip: Clip, kl_beta: float, has_reference: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy gradient, −min(ρA, clip(ρ)A), plus β·KL to the reference by the k3 estimator.

    GRPO: Shao et al. 2024, eq. 3 and 4. k3 = exp(r − p) − 1 − (r − p) ≥ 0 for log-probabilities r, p of the
    reference and the policy (Schulman, "Approximating KL divergence").

    Returns:
        The loss, and sums of: loss, kl (k3, nats a token), clipped (share of tokens), and what `mismatch` says of the
        policy now and when it was sampled.
    """
    delta = logp_K - columns.old_logp
    ratio = delta.exp()
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
    gain = torch.minimum(ratio * columns.advantage, bounded * columns.advantage)
    loss = -(columns.weight * gain).sum()
    k3 = torch.zeros_like(logp_K)
    if has_reference:
        gap = columns.reference_logp - logp_K
        k3 = gap.exp() - 1 - gap
        loss = loss + kl_beta * (columns.weight * k3).sum()
    with torch.no_grad():
        report = {
            "loss": loss.detach(),
            "kl": (columns.weight * k3).sum(),
            "clipped": (columns.weight * (ratio != bounded)).sum(),
            **mismatch(logp_K, columns),
        }
    return loss, report


def mismatch(logp_K: Tensor, columns: Columns) -> dict[str, Tensor]:
    """How far log-probabilities are from those that rollouts reported of the same tokens.

    Returns:
        mismatch_mean and mismatch_max of |Δ log p|, mismatch_kl (nats a token, of the rollout's policy to this one, by
        the k3 estimator), and mismatch_bits: in which the fp32 numbers differ, over all tokens that weigh something.
    """
    counted = columns.weight != 0
    delta = logp_K - columns.old_logp
    gap = delta.abs()[counted]
    return {
        "mismatch_mean": (columns.weight * delta.abs()).sum(),
        "mismatch_max": gap.max() if gap.numel() else delta.new_zeros(()),
        "mismatch_kl": (columns.weight * (delta.exp() - 1 - delta)).sum(),
        "mismatch_bits": differing_bits(logp_K[counted], columns.old_logp[counted]),
    }


def differing_bits(a: Tensor, b: Tensor) -> Tensor:
    """Number of bits in which two tensors of fp32 differ."""
    different = a.view(torch.int32) ^ b.view(torch.int32)
    return sum(((different >> place) & 1).sum() for place in range(32))  # type: ignore[return-value]
