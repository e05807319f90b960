"""The interface of loss functions: `Objective`, the per-token `LossInputs` of a micro-batch and its samples.

A row holds whole samples, and context ranks hold parts of the row; sums over a sample are over all context ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.data.batch import COLUMNS, TokenBatch
from lockstep.distributed.device import sent


@dataclass(frozen=True)
class SampleInputs:
    """The S samples of a row, and the sample of each of this rank's K tokens."""

    number_K: Tensor
    counted_S: Tensor
    """Number of tokens with weight of each sample, in the whole row."""
    weight_S: Tensor
    """Mean weight of those tokens."""
    group_S: Tensor
    preference_S: Tensor
    context: dist.ProcessGroup | None = None
    """The ranks that have parts of the row; None where this one has it all."""

    def sums(self, values_K: Tensor) -> Tensor:
        """Sums over the tokens of each sample, [S], the same on every context rank, with a gradient."""
        here = values_K.new_zeros(len(self.counted_S)).index_add(0, self.number_K, values_K)
        if self.context is None:
            return here
        found: Tensor = _Summed.apply(here, self.context)
        return found

    def of_tokens(self, values_S: Tensor) -> Tensor:
        """The value of each token's sample, [K]."""
        return values_S[self.number_K]

    @property
    def owns_samples(self) -> bool:
        """Whether this rank reports per-sample losses, which every context rank computes."""
        return self.context is None or self.context.rank() == 0


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduced(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(gradients[0], ctx.group), None


def _all_reduced(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = values.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


@dataclass(frozen=True)
class LossInputs:
    """Per-token tensors [K] of the predicted tokens, in fp32; `lockstep.data.batch.Sample` documents each."""

    weight: Tensor
    advantage: Tensor
    old_logp: Tensor
    proximal_logp: Tensor
    reference_logp: Tensor
    value: Tensor
    returns: Tensor
    samples: SampleInputs
    entropy: Tensor | None = None
    """Entropy of the policy at each token, with a gradient, where an objective needs it."""


def loss_inputs(batch: TokenBatch, device: torch.device, context: dist.ProcessGroup | None = None) -> LossInputs:
    """A row's loss inputs as tensors on a device.

    Args:
        batch: the part of the row that this rank has.
        context: the ranks that have the other parts.
    """

    def tensor(array: Any) -> Tensor:
        return sent(torch.tensor(array), device)

    about = batch.members
    samples = SampleInputs(
        number_K=tensor(batch.samples),
        counted_S=tensor(about.counted),
        weight_S=tensor(about.weight),
        group_S=tensor(about.group),
        preference_S=tensor(about.preference),
        context=context,
    )
    return LossInputs(**{name: tensor(getattr(batch, name)) for name in COLUMNS}, samples=samples)


Report = dict[str, Tensor]
"""Metrics by name. A number is added up over micro-batches and ranks, and the largest is taken of names that end in
`_max`; two numbers are a sum and a count, whose quotient is reported, see `token_mean`."""
Objective = Callable[[Tensor, LossInputs], tuple[Tensor, Report]]
"""(scores [K]: log-probabilities or values, loss inputs) → (loss of the micro-batch, metrics to report)."""


def token_mean(values_K: Tensor, inputs: LossInputs) -> Tensor:
    """The mean over the tokens that are trained on, as a sum and a count, [2]: whatever their weights in the loss."""
    counted = inputs.weight != 0
    return torch.stack([values_K[counted].sum(), counted.sum().to(values_K.dtype)])
