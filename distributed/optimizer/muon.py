"""Muon for sharded matrices: split over tensor ranks by rows or columns, and over replicas anywhere (ZeRO).

Momentum is elementwise, on the elements that a rank holds. Only orthogonalising needs whole matrices: each rank writes
its elements into zeros, an all-reduce adds them up, which changes no bit, and each keeps its part of the result. The
layout decides who computes, never what. The iterations are DeepSpeed's; its handling of Muon inside ZeRO is not used:
it takes the gradient's norm and clips after orthogonalising, and takes the part of a tensor rank for the matrix.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.distributed.checkpoint.tensors import Piece
from lockstep.distributed.optimizer.parameter_marks import is_expert
from lockstep.distributed.optimizer.partition import Sharded, Share
from lockstep.distributed.optimizer.zero import newton_schulz
from lockstep.distributed.world.groups import Groups


class Muon(Sharded):
    """The Muon optimizer (Jordan et al. 2024) for matrices, and another optimizer for all other parameters.

    Momentum is orthogonalised by Newton–Schulz iterations.

    The update of a matrix [A, B] is scaled by 0.2·√max(A, B), so that its root mean square is that of AdamW's updates:
    both take the same learning rate and weight decay (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4).
    """

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        pieces: Mapping[nn.Parameter, Sequence[Piece]],
        rest: torch.optim.Optimizer,
        groups: Groups,
    ) -> None:
        """
        Args:
            matrices: groups of parameters, each with its `lr`, `momentum` and `weight_decay`; the matrices of one group
                are whole in memory at the same time.
            pieces: the pieces of logical matrices in each of these parameters.
            rest: the optimizer of all other parameters; its groups and its state become this one's.
        """
        super().__init__([*matrices, *rest.param_groups], {})
        self._pieces, self._rest, self._groups = pieces, rest, groups
        rest.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, from gradients that are reduced and clipped."""
        self._rest.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self._rest.step()
        for group in self.param_groups:
            for held in (t for t in group["params"] if "momentum" in group and t.grad is not None):
                update = self._orthogonalised(self.shares[held], self._averaged(held, group["momentum"]))
                held.mul_(1 - group["lr"] * group["weight_decay"])
                held.add_(update, alpha=-group["lr"])

    def _averaged(self, held: Tensor, momentum: float) -> Tensor:
        """The average of past gradients, one step ahead (Nesterov)."""
        gradient, state = held.grad, self.state[held]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(held)
        average: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, average, momentum)

    def _orthogonalised(self, shares: Sequence[Share], average: Tensor) -> Tensor:
        """This rank's elements of the updates of some parameters, from its elements of their momentum."""
        parameters = self._over_replicas(shares, average)
        parts = [
            (share, piece, piece.view(parameter))
            for share, parameter in zip(shares, parameters, strict=True)
            for piece in self._pieces[share.parameter]
        ]
        wholes = self._over_tensor_ranks([(piece, part) for _, piece, part in parts])
        needed = [(p, part, w) for (share, p, part), w in zip(parts, wholes, strict=True) if share.length]
        exact = shares[0].parameter.dtype == torch.float32
        for shape in {piece.shape for piece, _, _ in needed}:
            alike = [found for found in needed if found[0].shape == shape]
            updates = newton_schulz(torch.stack([whole for _, _, whole in alike]), exact) * (0.2 * max(shape) ** 0.5)
            for (piece, part, _), update in zip(alike, updates, strict=True):
                part.copy_(update[_slices(piece)])
        result = torch.zeros_like(average)
        for share, parameter in zip(shares, parameters, strict=True):
            share.within(result).copy_(share.of(parameter))
        return result

    def _over_replicas(self, shares: Sequence[Share], held: Tensor) -> list[Tensor]:
        """Whole local parameters, assembled from the elements that each replica holds."""
        sizes, device = [share.shape.numel() for share in shares], shares[0].parameter.device
        flat = torch.zeros(sum(sizes), dtype=held.dtype, device=device)
        parameters = [t.view(share.shape) for t, share in zip(flat.split(sizes), shares, strict=True)]
        for share, parameter in zip(shares, parameters, strict=True):
            share.of(parameter).copy_(share.within(held))
        if self._groups.layout.zero_stage:
            expert = is_expert(shares[0].parameter)
            dist.all_reduce(flat, group=self._groups.expert_replicas if expert else self._groups.replicas)
        return parameters

    def _over_tensor_ranks(self, parts: Sequence[tuple[Piece, Tensor]]) -> list[Tensor]:
        """Whole logical matrices, assembled from the parts that each tensor rank holds."""
        if self._groups.layout.tensor == 1:
            return [part for _, part in parts]
        sizes = [torch.Size(piece.shape).numel() for piece, _ in parts]
        flat = parts[0][1].new_zeros(sum(sizes))
        wholes = [t.view(piece.shape) for t, (piece, _) in zip(flat.split(sizes), parts, strict=True)]
        for whole, (piece, part) in zip(wholes, parts, strict=True):
            whole[_slices(piece)] = part
        dist.all_reduce(flat, group=self._groups.tensor)
        return wholes


def _slices(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in piece.box)
