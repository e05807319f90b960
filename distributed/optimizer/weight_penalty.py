"""L2 and EWC against forgetting: a quadratic penalty that pulls trained weights back to old ones, in any ZeRO stage.

Ω(θ) = ½ Σ (l2 + ewc · F) (θ − θ_old)², with F the diagonal of the empirical Fisher information (Kirkpatrick et al.
2017, eq. 3). It is of the weights alone: its gradient joins that of the data once a step, after the reduction over
micro-batches and replicas and before the norm and clipping, on the elements that this rank's optimizer updates.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep.distributed.optimizer.grad_norm import LocalValues, PartNorms
from lockstep.distributed.optimizer.partition import Share

OLD, FISHER = "old", "fisher"
"""Kinds of state in a checkpoint: the old weights, and the diagonal of the Fisher information."""

ReducedGradient = tuple[Tensor, Share, Tensor, int]
"""The tensor that the optimizer steps, a share in it, the share's gradient in any shape, and the ranks that hold it."""


class MissingOldWeights(ValueError):
    """A penalty without the old weights, or the Fisher information, that it is a distance from."""


@dataclass(frozen=True)
class Stiffness:
    """Coefficients of the two parts of the penalty."""

    l2: float = 0.0
    ewc: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.l2 or self.ewc)


class WeightPenalty:
    """This rank's old weights and Fisher information, and the penalty that they give; nothing while it has none."""

    def __init__(self, norms: PartNorms) -> None:
        self._norms = norms
        self.stiffness = Stiffness()
        self.kept: dict[str, dict[Tensor, Tensor]] = {}
        """By kind, in fp32 and flat, for each tensor that the optimizer steps."""
        self.value = 0.0
        """Ω of the whole model, before the last step."""

    def forget(self) -> None:
        """Drop what is kept, for a new phase of training."""
        self.stiffness = Stiffness()
        self.kept.clear()

    def pull(self, stiffness: Stiffness) -> None:
        """Set the coefficients for the steps that follow.

        Raises:
            MissingOldWeights: when nothing is kept that they could apply to.
        """
        needed = {OLD: bool(stiffness), FISHER: bool(stiffness.ewc)}
        if missing := [kind for kind, needs in needed.items() if needs and kind not in self.kept]:
            raise MissingOldWeights(
                f"l2={stiffness.l2} and ewc={stiffness.ewc} hold weights near old ones, and there is no {missing[0]!r} "
                "state: resume from a checkpoint that was saved with the same penalty, or begin another run"
            )
        self.stiffness = stiffness

    def keep(self, stepped: Iterable[Tensor]) -> None:
        """Take the weights as they are for the old ones."""
        self.kept[OLD] = {tensor: tensor.detach().float().clone() for tensor in stepped}

    @torch.no_grad()
    def add_to(self, gradients: Iterable[ReducedGradient]) -> None:
        """Add ∇Ω to all reduced gradients of a step, and set `value`. All ranks call this together."""
        if self.stiffness:
            self.value = float(self._norms.squares(self._added(gradients)).sum()) / 2

    def _added(self, gradients: Iterable[ReducedGradient]) -> Iterator[LocalValues]:
        """Adds to each gradient as it comes by; yields what Σ/2 of the squares of is Ω."""
        fisher = self.kept.get(FISHER, {})
        for tensor, share, gradient, holders in gradients:
            distance = share.within(tensor.detach()) - share.within(self.kept[OLD][tensor])
            root = torch.full_like(distance, self.stiffness.l2)
            if tensor in fisher:
                root += self.stiffness.ewc * share.within(fisher[tensor])
            gradient += (root * distance).view_as(gradient).to(gradient.dtype)
            yield share.parameter, root.sqrt_() * distance, holders

    @torch.no_grad()
    def add_squares(self, gradients: Iterable[ReducedGradient], scale: float) -> None:
        """Add scale · g² to the Fisher information."""
        fisher = self.kept.setdefault(FISHER, {})
        for tensor, share, gradient, _ in gradients:
            if tensor not in fisher:  # a tensor may have the shares of a whole model
                fisher[tensor] = torch.zeros_like(tensor.detach(), dtype=torch.float32)
            share.within(fisher[tensor]).add_(gradient.reshape(-1).float().square(), alpha=scale)
