"""Gradient steps on any module in any layout: micro-batches in, one update out. Blind to what is being optimised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.distributed.groups import Groups
from lockstep.distributed.pipeline import Forward, Loss, Stage, run_forward, run_forward_backward
from lockstep.distributed.zero import ZeroOptimizer, replicate


class MissingGradient(RuntimeError):
    """A trainable parameter took no part in the loss."""


@dataclass(frozen=True)
class StepResult:
    """What one update reports, the same on every rank, and the gradient's global norm before clipping.

    A value is the sum over the global batch, or the largest of its micro-batches if its name ends in `_max`.
    """

    values: dict[str, float]
    grad_norm: float


class Engine:
    """A stage, its optimizer and the schedule that drives them."""

    def __init__(
        self,
        stage: Stage,
        groups: Groups,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float,
        tied: nn.Parameter | None = None,
    ) -> None:
        """
        Args:
            tied: the embedding that the first and the last stage both hold, where they are tied over stages.
        """
        self.stage, self.groups = stage, groups
        self._tied = tied if groups.layout.pipeline > 1 else None
        if self._tied is not None and not groups.is_first_stage:
            replicate(self._tied)
        self._zero = ZeroOptimizer(stage, optimizer, groups, clip_norm)

    def step(
        self, batches: Sequence[Any], forward: Forward, loss: Loss, *, tokens: int, learning_rate: float
    ) -> StepResult:
        """One update from all micro-batches of this data rank.

        `loss` returns this micro-batch's part of a sum over the global batch; so micro-batch size, packing and the
        number of data ranks never change the gradient.

        Raises:
            MissingGradient: when a trainable parameter received no gradient.
        """
        replicas = self.groups.layout.data

        def share(result: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            value, report = loss(result, batch)
            return value * replicas, report

        reports = run_forward_backward(self.stage, batches, forward, share, tokens=tokens)
        self._finish_gradients()
        norm = self._zero.step(learning_rate)
        return StepResult(self._reduced(reports), norm)

    def forget(self) -> None:
        """Start the optimizer's moments afresh, for a new phase of training."""
        self._zero.forget()

    def evaluate(self, stage: Stage, batches: Sequence[Any], forward: Forward, *, tokens: int) -> list[Tensor]:
        """Results of a forward pass of `stage` for this data rank's micro-batches; empty but on the last stage."""
        return run_forward(stage, batches, forward, tokens=tokens)

    def _finish_gradients(self) -> None:
        if self._tied is not None and self.groups.embedding is not None:
            gradient = self._zero.gradient(self._tied)
            assert gradient is not None
            dist.all_reduce(gradient, group=self.groups.embedding)
        for name, parameter in self.stage.named_parameters():
            if parameter.requires_grad and self._zero.gradient(parameter) is None:
                raise MissingGradient(f"{name} received no gradient on rank {self.groups.rank}")

    def _reduced(self, reports: list[dict[str, Tensor]]) -> dict[str, float]:
        """Reported values over all micro-batches and data ranks, sent from the last stage to all stages."""
        shared: list[Any] = [None]
        if self.groups.is_last_stage:
            names = sorted(reports[0])
            columns = {n: torch.stack([r[n].detach().double() for r in reports]) for n in names}
            sums = torch.stack([column.sum() for column in columns.values()])
            peaks = torch.stack([column.max() for column in columns.values()])
            dist.all_reduce(sums, group=self.groups.data)
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=self.groups.data)
            values = torch.where(torch.tensor([n.endswith("_max") for n in names]), peaks.cpu(), sums.cpu())
            shared = [dict(zip(names, values.tolist(), strict=True))]
        dist.broadcast_object_list(shared, src=self.groups.last_stage_rank, group=self.groups.pipeline)
        return shared[0]
