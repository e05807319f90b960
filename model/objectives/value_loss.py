"""The value loss of PPO's critic, with clipping."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.model.objectives.objective import LossInputs, Report, token_mean


@dataclass(frozen=True)
class ValueLoss:
    """The critic's objective, as a value with its settings."""

    clip: float | None = 0.2
    """How far a value may move from the one before the update; None for any."""

    def __call__(self, values_K: Tensor, inputs: LossInputs) -> tuple[Tensor, Report]:
        """The loss Σ weight · ½ max((v − R)², (clip(v, v_old ± ε) − R)²), R the returns: PPO's critic as in its code.

        Returns:
            The loss, and metrics: value_loss; and over tokens: value (the mean), value_clipped (the share that was).
        """
        error = (values_K - inputs.returns).square()
        clipped = torch.zeros_like(values_K, dtype=torch.bool)
        if self.clip is not None:
            near = inputs.value + (values_K - inputs.value).clamp(-self.clip, self.clip)
            other = (near - inputs.returns).square()
            clipped, error = other > error, torch.maximum(error, other)
        loss = (inputs.weight * error).sum() / 2
        with torch.no_grad():
            report = {
                "value_loss": loss.detach(),
                "value": token_mean(values_K, inputs),
                "value_clipped": token_mean(clipped.to(values_K.dtype), inputs),
            }
        return loss, report
