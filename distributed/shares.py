"""Which elements of which parameters a rank's optimizer is given: ZeRO lays parameters flat and cuts them anywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Share:
    """Elements of a parameter, laid flat, that a rank's optimizer updates: none where `length` is 0."""

    parameter: nn.Parameter
    shape: torch.Size
    """Of the parameter; its own shape is empty where ZeRO-3 has split it."""
    start: int
    length: int
    offset: int
    """Where they lie in the tensor that the optimizer is given, laid flat."""

    def of(self, whole: Tensor) -> Tensor:
        """These elements of a contiguous tensor of the parameter's shape."""
        return whole.view(-1)[self.start : self.start + self.length]

    def within(self, held: Tensor) -> Tensor:
        """These elements of the tensor that the optimizer is given, or of its gradient or state."""
        return held.view(-1)[self.offset : self.offset + self.length]


class Sharded(torch.optim.Optimizer):
    """An optimizer that works on more than single elements, and must know which ones it is given."""

    held: Mapping[Tensor, Sequence[Share]]
    """For each tensor to step its shares of parameters, in one order on all replicas; set before the first step."""
