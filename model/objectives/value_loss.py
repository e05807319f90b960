"""The critic's loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.model.objectives.objective import LossInputs, Report


@dataclass(frozen=True)
class ValueLoss:
    """The critic's objective, as a value: what `value_loss` computes."""

    clip: float | None = 0.2
    """How far a value may move from the one before the update; None for any."""

    def __call__(self, values_K: Tensor, columns: LossInputs) -> tuple[Tensor, Report]:
        """See `value_loss`."""
        return value_loss(values_K, columns, self)


def value_loss(values_K: Tensor, columns: LossInputs, rule: ValueLoss) -> tuple[Tensor, Report]:
    """Σ weight · ½ max((v − R)², (clip(v, v_old ± ε) − R)²), R the returns: PPO's critic as in its code.

    Returns:
        The loss, and sums of: value_loss, value (its mean), value_clipped (share of tokens).
    """
    error = (values_K - columns.returns).square()
    clipped = torch.zeros_like(values_K, dtype=torch.bool)
    if rule.clip is not None:
        near = columns.value + (values_K - columns.value).clamp(-rule.clip, rule.clip)
        other = (near - columns.returns).square()
        clipped, error = other > error, torch.maximum(error, other)
    loss = (columns.weight * error).sum() / 2
    with torch.no_grad():
        report = {
            "value_loss": loss.detach(),
            "value": (columns.weight * values_K).sum(),
            "value_clipped": (columns.weight * clipped).sum(),
        }
    return loss, report
