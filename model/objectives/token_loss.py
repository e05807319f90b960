"""Objectives: pure functions from a model's score of each token and a batch's columns to a loss.

`token_loss` is pretraining, SFT, RSFT and every policy gradient, `value_loss` is PPO's critic, and `pair_loss` (in
`pairs`) reward models and DPO. Sums run over the selected tokens of a micro-batch; the weight column already divides by
the size of the global batch.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lockstep.model.objectives.importance_ratio import Clip, Correction, Level, bounded, corrected, ratio
from lockstep.model.objectives.kl import KL, estimate
from lockstep.model.objectives.mismatch import largest, mismatch
from lockstep.model.objectives.objective import LossInputs, Report


def nll(logp_K: Tensor, columns: LossInputs) -> tuple[Tensor, Report]:
    """Weighted negative log-likelihood in nats: pretraining, SFT, and REINFORCE where advantages differ from 1."""
    loss = -(columns.weight * columns.advantage * logp_K).sum()
    return loss, {"loss": loss}


@dataclass(frozen=True)
class TokenLoss:
    """An objective of the policy, as a value: what `token_loss` computes."""

    gain: Literal["clipped", "cispo", "reinforce"] = "clipped"
    """With ρ = π / π_proximal: min(ρA, clip(ρ)A) of PPO; clip(ρ), a constant to the gradient, times A log π of CISPO
    (MiniMax-M1, 2025, eq. 4); or A log π."""
    level: Level = "token"
    """What ρ is of; see `ratio`."""
    clip: Clip = field(default_factory=Clip)
    kl: KL = field(default_factory=KL)
    correction: Correction | None = None
    entropy: float = 0.0
    """Times the policy's entropy, which is added to the gain."""
    proximal: Literal["column", "now"] = "column"
    """The policy that ρ is to: that of the column, or the one being trained, so that ρ is 1 (one update a batch)."""
    has_reference: bool = True
    """Whether `reference_logp` says anything."""

    def __call__(self, logp_K: Tensor, columns: LossInputs) -> tuple[Tensor, Report]:
        """See `token_loss`."""
        return token_loss(logp_K, columns, self)


def token_loss(logp_K: Tensor, columns: LossInputs, rule: TokenLoss) -> tuple[Tensor, Report]:
    """−Σ weight · (correction · gain − β · KL + coefficient · entropy).

    GRPO: Shao et al. 2024, eq. 3 and 4; `docs/methods.md` has the equation of every method.

    Returns:
        The loss, and sums of: loss, kl (k3, nats a token), clipped (share of tokens whose ratio is out of bounds),
        ratio_max (the largest |ratio − 1|), what `mismatch` says of the policy now and when it was sampled; entropy and
        mean correction where they are used.
    """
    proximal = columns.proximal_logp if rule.proximal == "column" else logp_K.detach()
    ratio_K = ratio(logp_K - proximal, columns.samples, rule.level)
    gain = _gain(logp_K, ratio_K, columns.advantage, rule)
    report: Report = {}
    if rule.correction:
        correction = corrected(columns.old_logp, proximal, columns.samples, rule.correction)
        gain = correction * gain
        report["correction"] = (columns.weight * correction).sum()
    loss = -(columns.weight * gain).sum()
    if rule.kl.in_loss and rule.has_reference:
        distance = estimate(logp_K, columns.reference_logp, rule.kl.estimator)
        loss = loss + rule.kl.in_loss * (columns.weight * distance).sum()
    if rule.entropy and columns.entropy is not None:
        entropy = (columns.weight * columns.entropy).sum()
        loss = loss - rule.entropy * entropy
        report["entropy"] = entropy.detach()
    with torch.no_grad():
        k3 = estimate(logp_K, columns.reference_logp, "k3") if rule.has_reference else torch.zeros_like(logp_K)
        report |= {
            "loss": loss.detach(),
            "kl": (columns.weight * k3).sum(),
            "clipped": (columns.weight * (ratio_K != bounded(ratio_K, rule.clip))).sum(),
            "ratio_max": largest((ratio_K - 1).abs()[columns.weight != 0]),
            **mismatch(logp_K, columns),
        }
    return loss, report


def _gain(logp_K: Tensor, ratio_K: Tensor, advantage_K: Tensor, rule: TokenLoss) -> Tensor:
    if rule.gain == "reinforce":
        return advantage_K * logp_K
    within = bounded(ratio_K, rule.clip)
    if rule.gain == "cispo":
        return within.detach() * advantage_K * logp_K
    gain = torch.minimum(ratio_K * advantage_K, within * advantage_K)
    if rule.clip.dual is None:
        return gain
    return torch.where(advantage_K < 0, torch.maximum(gain, rule.clip.dual * advantage_K), gain)
