"""ZeRO's partition: which elements of which flattened parameters this rank's optimizer updates."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup as Group


@dataclass(frozen=True)
class Share:
    """The range of a flattened parameter's elements that this rank's optimizer updates; it may be empty."""

    parameter: nn.Parameter
    shape: torch.Size
    """Of the parameter; its own shape is empty where ZeRO-3 has split it."""
    cuts: tuple[int, ...]
    """[ranks + 1] where the share of each rank that shares the parameter begins, and where the last one ends."""
    rank: int
    """This one among them."""
    offset: int
    """Where they lie in the tensor that the optimizer is given, laid flat."""

    @property
    def start(self) -> int:
        """Index of the first of these elements."""
        return self.cuts[self.rank]

    @property
    def length(self) -> int:
        """The number of these elements."""
        return self.cuts[self.rank + 1] - self.start

    def of(self, whole: Tensor) -> Tensor:
        """These elements of a contiguous tensor of the parameter's shape."""
        return whole.view(-1)[self.start : self.start + self.length]

    def within(self, held: Tensor) -> Tensor:
        """These elements of the tensor that the optimizer is given, or of its gradient or state."""
        return held.view(-1)[self.offset : self.offset + self.length]


def share_of(parameter: nn.Parameter, cuts: Iterable[int], rank: int, offset: int) -> Share:
    """The share of a parameter between a rank's cuts, which are clamped to the parameter."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return Share(parameter, shape, tuple(min(max(0, cut), shape.numel()) for cut in cuts), rank, offset)


def stored(share: Share) -> Tensor:
    """The weights of a share as this rank stores them, flat: with ZeRO-3 in a tensor of its own."""
    own: Tensor | None = vars(share.parameter).get("ds_tensor")
    return share.of(share.parameter.detach()) if own is None else own[: share.length]


def shares_of_all(parameters: Sequence[nn.Parameter], places: Sequence[int], size: int, group: Group) -> list[Share]:
    """Shares under ZeRO-1 and 2: parameters are concatenated flat, and each rank has `size` elements of that."""
    ranks, rank = group.size(), group.rank()
    return [
        share_of(p, [cut * size - at for cut in range(ranks + 1)], rank, max(0, at - rank * size))
        for p, at in zip(parameters, places, strict=True)
    ]


def shares_of_each(parameters: Sequence[Any], group: Group) -> list[Share]:
    """Shares under ZeRO-3: each rank has an equal part of each parameter, and its parts are concatenated flat."""
    ranks, rank = group.size(), group.rank()
    sizes = [p.partition_numel() for p in parameters]
    ends = itertools.accumulate(sizes)
    return [
        share_of(p, [cut * size for cut in range(ranks + 1)], rank, end - size)
        for p, size, end in zip(parameters, sizes, ends, strict=True)
    ]


class Sharded(torch.optim.Optimizer):
    """An optimizer that is not elementwise, and so must know which elements of which parameters it is given."""

    shares: Mapping[Tensor, Sequence[Share]]
    """The shares in each tensor that is stepped, in the same order on all replicas; set before the first step."""
