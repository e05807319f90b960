"""Token-level losses: negative log-likelihood (pretraining, SFT) and policy gradients (PPO, GRPO, SAPO, DPPO, CISPO).

Sums run over the predicted tokens of a micro-batch; weights already divide by the size of the global batch. The
critic's loss is in `value_loss`, those of reward models and DPO in `pair_loss`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lockstep.model.objectives.importance_ratio import (
    Clip,
    Correction,
    Divergence,
    Gate,
    Level,
    bounded,
    corrected,
    diverged,
    gated,
    ratio,
)
from lockstep.model.objectives.kl import KL, estimate
from lockstep.model.objectives.mismatch import largest, mismatch_metrics
from lockstep.model.objectives.objective import LossInputs, Report, token_mean

Gain = Literal["clipped", "cispo", "sapo", "dppo", "reinforce"]


def nll(logp_K: Tensor, inputs: LossInputs) -> tuple[Tensor, Report]:
    """Weighted negative log-likelihood in nats: pretraining, SFT, and REINFORCE where advantages differ from 1."""
    loss = -(inputs.weight * inputs.advantage * logp_K).sum()
    return loss, {"loss": loss}


@dataclass(frozen=True)
class TokenLoss:
    """The policy-gradient objective, as a value with its settings."""

    gain: Gain = "clipped"
    """With ρ = π / π_proximal: min(ρA, clip(ρ)A) of PPO; clip(ρ), a constant to the gradient, times A log π of CISPO
    (MiniMax-M1, 2025, eq. 4); gate(ρ)A of SAPO, see `gated`; ρA, or 0 where `diverged`, of DPPO; or A log π."""
    level: Level = "token"
    """Whether ρ is per token or per sequence; see `ratio`."""
    clip: Clip = field(default_factory=Clip)
    gate: Gate = field(default_factory=Gate)
    divergence: Divergence = "tv"
    """What DPPO's trust region is measured by."""
    kl: KL = field(default_factory=KL)
    correction: Correction | None = None
    entropy: float = 0.0
    """Coefficient of the policy's entropy, which is added to the gain."""
    proximal: Literal["column", "now"] = "column"
    """The policy that ρ is to: that of the column, or the one being trained, so that ρ is 1 (one update a batch)."""
    has_reference: bool = True
    """Whether the batch has log-probabilities of a reference."""

    def __call__(self, logp_K: Tensor, inputs: LossInputs) -> tuple[Tensor, Report]:
        """The loss −Σ weight · (correction · gain − β · KL + coefficient · entropy), and its metrics.

        GRPO: Shao et al. 2024, eq. 3 and 4; `docs/methods.md` has the equation of every method.

        Returns:
            The loss, and metrics, which are means over the tokens that are trained on, whatever their weights: kl (k3,
            nats a token) where there is a reference, clipped (share of tokens out of bounds) where there are any,
            entropy and correction where they are used; ratio_max (the largest |ratio − 1|), and `mismatch_metrics`
            between the policy now and when it was sampled.
        """
        proximal = inputs.proximal_logp if self.proximal == "column" else logp_K.detach()
        ratio_K = ratio(logp_K - proximal, inputs.samples, self.level)
        outside = _outside(logp_K, proximal, ratio_K, inputs.advantage, self)
        gain = _gain(logp_K, ratio_K, inputs.advantage, outside, self)
        report: Report = {} if self.gain == "sapo" else {"clipped": token_mean(outside.to(logp_K.dtype), inputs)}
        if self.correction:
            correction = corrected(inputs.old_logp, proximal, inputs.samples, self.correction)
            gain = correction * gain
            report["correction"] = token_mean(correction, inputs)
        loss = -(inputs.weight * gain).sum()
        if self.kl.in_loss and self.has_reference:
            distance = estimate(logp_K, inputs.reference_logp, self.kl.estimator)
            loss = loss + self.kl.in_loss * (inputs.weight * distance).sum()
        if self.entropy and inputs.entropy is not None:
            loss = loss - self.entropy * (inputs.weight * inputs.entropy).sum()
            report["entropy"] = token_mean(inputs.entropy.detach(), inputs)
        with torch.no_grad():
            if self.has_reference:
                report["kl"] = token_mean(estimate(logp_K, inputs.reference_logp, "k3"), inputs)
            report |= {
                "loss": loss.detach(),
                "ratio_max": largest((ratio_K - 1).abs()[inputs.weight != 0]),
                **mismatch_metrics(logp_K, inputs),
            }
        return loss, report


@torch.no_grad()
def _outside(logp_K: Tensor, proximal_K: Tensor, ratio_K: Tensor, advantage_K: Tensor, rule: TokenLoss) -> Tensor:
    """Which tokens are out of the bounds of the rule, [K]."""
    if rule.gain == "dppo":
        return diverged(logp_K, proximal_K, advantage_K, rule.clip, rule.divergence)
    return ratio_K != bounded(ratio_K, rule.clip)


def _gain(logp_K: Tensor, ratio_K: Tensor, advantage_K: Tensor, outside_K: Tensor, rule: TokenLoss) -> Tensor:
    match rule.gain:
        case "reinforce":
            return advantage_K * logp_K
        case "cispo":
            return bounded(ratio_K, rule.clip).detach() * advantage_K * logp_K
        case "sapo":
            return gated(ratio_K, advantage_K, rule.gate) * advantage_K
        case "dppo":
            return torch.where(outside_K, 0.0, ratio_K * advantage_K)
        case "clipped":
            return _clipped(ratio_K, advantage_K, rule.clip)


def _clipped(ratio_K: Tensor, advantage_K: Tensor, clip: Clip) -> Tensor:
    gain = torch.minimum(ratio_K * advantage_K, bounded(ratio_K, clip) * advantage_K)
    if clip.dual is None:
        return gain
    return torch.where(advantage_K < 0, torch.maximum(gain, clip.dual * advantage_K), gain)
