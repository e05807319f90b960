"""Preference losses: DPO, IPO, Bradley–Terry and Plackett–Luce, over the samples of a prompt.

The score z of a sample is the sum over its tokens of (score − reference_logp): for DPO and IPO the log-ratio of policy
and reference, and for a reward model, whose samples have one token with weight and no reference, the value there.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lockstep.model.objectives.objective import LossInputs, Report, SampleInputs


@dataclass(frozen=True)
class PairLoss:
    """The preference objective of reward models and DPO, as a value with its settings."""

    kind: Literal["sigmoid", "ipo", "plackett_luce"] = "sigmoid"
    """Of a better sample's margin x over a worse one's: −log σ(βx), DPO (Rafailov et al. 2023, eq. 7) and, with β = 1,
    Bradley–Terry; (x − 1/(2β))², IPO (Azar et al. 2024, eq. 17). Or of a whole ranking: −Σ log of the share of exp(βz)
    that each has among those not better (Plackett–Luce; Rafailov et al., eq. 18)."""
    beta: float = 1.0
    smoothing: float = 0.0
    """The probability that a label is wrong (conservative DPO, Mitchell 2023); of `sigmoid` only."""

    def __call__(self, scores_K: Tensor, inputs: LossInputs) -> tuple[Tensor, Report]:
        """Σ weight · loss over all pairs (or rankings) of a group, and metrics; a sample's weight is its tokens' mean.

        `preference_samples` makes the samples and their weights, so that the sum over the global batch is a mean over
        its groups of the mean over the comparisons of a group.

        Returns:
            The loss, and sums of: loss, accuracy (share of pairs in the right order), margin (mean of
            β · (better − worse)).
        """
        samples = inputs.samples
        z_S = self.beta * samples.sums(scores_K - inputs.reference_logp)
        margin_SS = z_S[:, None] - z_S[None, :]
        weight_SS = _pair_weights(samples)
        ranked = self.kind == "plackett_luce"
        loss = _ranking(z_S, samples) if ranked else (weight_SS * _of_margin(margin_SS, self)).sum()
        counts = float(samples.owns_samples)
        with torch.no_grad():
            report = {
                "loss": counts * loss.detach(),
                "accuracy": counts * (weight_SS * (margin_SS > 0)).sum(),
                "margin": counts * (weight_SS * margin_SS).sum(),
            }
        return counts * loss, report


def _of_margin(margin_SS: Tensor, rule: PairLoss) -> Tensor:
    if rule.kind == "ipo":  # the margin has β already
        return (margin_SS - 0.5).square() / rule.beta**2
    return -(1 - rule.smoothing) * logsigmoid(margin_SS) - rule.smoothing * logsigmoid(-margin_SS)


def _together(samples: SampleInputs) -> Tensor:
    """Which samples are compared, [S, S]."""
    heard = samples.counted_S > 0
    return (samples.group_S[:, None] == samples.group_S[None, :]) & heard[:, None] & heard[None, :]


def _pair_weights(samples: SampleInputs) -> Tensor:
    """Of each pair (better, worse), [S, S]: the group's weight, shared by its pairs."""
    better = samples.preference_S[:, None] > samples.preference_S[None, :]
    pairs = (_together(samples) & better).to(samples.weight_S.dtype)
    of_group = _together(samples).to(pairs.dtype) @ pairs.sum(1)
    return pairs * (samples.weight_S / of_group.clamp_min(1))[:, None]


def _ranking(z_S: Tensor, samples: SampleInputs) -> Tensor:
    """−Σ weight · log (exp z / Σ exp z of those that are not better)."""
    not_better = _together(samples) & (samples.preference_S[:, None] >= samples.preference_S[None, :])
    among = torch.where(not_better, z_S[None, :], -torch.inf)
    heard = samples.counted_S > 0
    surprise = torch.logsumexp(among[heard], dim=1) - z_S[heard]
    return (samples.weight_S[heard] * surprise).sum()
