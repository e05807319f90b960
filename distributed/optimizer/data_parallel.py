"""Optimizer steps without ZeRO: every replica sums, averages and clips all gradients, and updates all weights.

DeepSpeed makes the fp32 masters of bf16 weights there, and no more: it has no sums of their gradients in fp32, reports
no norm of fp32 gradients, and leaves experts out of that of bf16 ones.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.distributed.optimizer.grad_norm import global_norm
from lockstep.distributed.optimizer.parameter_marks import is_expert
from lockstep.distributed.world.groups import Groups, before_leaving

BUCKET = 20_000_000
"""Elements that are reduced at a time: enough for a network, and few enough that they are still in a cache."""


class DataParallel:
    """Gradients of one step, which every replica holds whole."""

    def __init__(
        self,
        owners: Mapping[Tensor, nn.Parameter],
        groups: Groups,
        clip_norm: float,
        sums_in_fp32: bool,
    ) -> None:
        """
        Args:
            owners: the parameter of each tensor that the optimizer steps: itself, or the one that it is the master of.
            clip_norm: bound of the global norm; 0 for none.
            sums_in_fp32: add gradients of bf16 parameters up in fp32, and not in their own dtype as autograd does.
        """
        self._owners, self._groups, self.clip_norm = owners, groups, clip_norm
        self._sums: dict[nn.Parameter, Tensor] = {}
        for parameter in owners.values() if sums_in_fp32 else ():
            before_leaving(parameter.register_post_accumulate_grad_hook(self._add).remove)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, squares_of: Callable[[], Tensor]) -> Tensor:
        """Average gradients over the replicas, clip, update, and drop them; without an update where one is no number.

        Args:
            squares_of: what `PartNorms.squares` says of `gradients`; it may change them first.

        Returns:
            The same, of the gradients before clipping.
        """
        for parameter in self._owners.values():
            if parameter.grad is not None:
                self._sums[parameter], parameter.grad = parameter.grad, None
        self._average((p for p in self._sums if not is_expert(p)), self._groups.replicas)
        self._average((p for p in self._sums if is_expert(p)), self._groups.expert_replicas)
        squares = squares_of()
        norm = float(global_norm(squares))
        if math.isfinite(norm):
            self._update(optimizer, norm)
        self._sums.clear()
        return squares

    def _add(self, parameter: nn.Parameter) -> None:
        """Hook of a parameter: its gradient over one micro-batch is there."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if parameter in self._sums:
            self._sums[parameter] += gradient
        else:
            self._sums[parameter] = gradient.float()

    def _average(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
        """Σ over a group / replicas of the model, which of experts, too, are those that the loss was multiplied by."""
        replicas = dist.get_world_size(self._groups.replicas)
        if replicas == 1:
            return
        for bucket in buckets(parameters):
            flat = torch.cat([self._sums[p].reshape(-1) for p in bucket])
            dist.all_reduce(flat, group=group)
            means = flat.mul_(1 / replicas).split([p.numel() for p in bucket])
            self._sums |= {p: mean.view_as(p) for p, mean in zip(bucket, means, strict=True)}

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The tensors that the optimizer steps, and their averaged gradients."""
        return ((tensor, self._sums[p]) for tensor, p in self._owners.items() if p in self._sums)

    def _update(self, optimizer: torch.optim.Optimizer, norm: float) -> None:
        """Step with clipped gradients; bf16 weights are their masters, rounded."""
        for tensor, parameter in self._owners.items():
            if parameter in self._sums:
                tensor.grad = self._sums[parameter].to(tensor.dtype)
                if self.clip_norm and norm > self.clip_norm:
                    tensor.grad *= self.clip_norm / (norm + 1e-6)
        optimizer.step()
        for tensor, parameter in self._owners.items():
            tensor.grad = None
            if tensor is not parameter:
                parameter.copy_(tensor)


def buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of together at most `BUCKET` elements, or one that has more."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
