"""The policy that another is kept near to, beside it in the same ranks: a version of it, or a moving average.

An average is kept in fp32: in bf16 what one step adds to it would be rounded away.
"""

import torch
from torch import Tensor

from lockstep.distributed.pipeline import Stage
from lockstep.model.train import transformer_of
from lockstep.model.transformer import Transformer


class Reference:
    """A model in the layout of the policy, which follows it."""

    def __init__(self, stage: Stage, *, every: int = 0, decay: float | None = None) -> None:
        """
        Args:
            stage: of a model with the policy's weights.
            every: steps after which it takes the policy's weights over; 0 for never.
            decay: of a moving average, what it keeps of itself at each step, in the place of `every`.
        """
        self.stage, self._every, self._decay = stage, every, decay
        self._parameters = dict(transformer_of(stage).named_parameters())
        kept = self._parameters if decay is not None else {}
        self._average: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in kept.items()}

    @torch.no_grad()
    def follow(self, policy: Transformer, step: int) -> None:
        """Take note of the policy after a step, numbered from 1; its weights are whole."""
        if self._decay is not None:
            for name, parameter in policy.named_parameters():
                self._average[name].lerp_(parameter.float(), 1 - self._decay)
                self._parameters[name].copy_(self._average[name])
        elif self._every and step % self._every == 0:
            for name, parameter in policy.named_parameters():
                self._parameters[name].copy_(parameter)

    @property
    def moves(self) -> bool:
        """Whether it ever changes."""
        return self._decay is not None or self._every > 0
