"""Global norms of gradients and weights in any layout, in total and for each part of the model.

Every distinct element of the model counts once: ranks that hold copies divide their sums of squares by the number of
copies. Experts count like all other parameters, unlike in DeepSpeed.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.distributed.optimizer.parameter_marks import is_expert
from lockstep.distributed.world.groups import Groups

LocalValues = tuple[nn.Parameter, Tensor, int]
"""A parameter, the tensor (or this rank's elements of it) whose norm is taken, and the number of ranks that hold it."""


class PartNorms:
    """Sums of squares over all ranks, for each part of the model."""

    def __init__(self, groups: Groups, parts: Mapping[str, Iterable[nn.Parameter]], device: torch.device) -> None:
        """
        Args:
            parts: name and parameters of each part; see `Engine`.
            device: of the parameters.
        """
        self._groups, self._device, self._names = groups, device, [*parts]
        self._part_of = {p: i for i, members in enumerate(parts.values()) for p in members}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all parts that this rank holds."""
        return [*self._part_of]

    def copies(self, parameter: nn.Parameter) -> int:
        """The number of ranks that hold the same whole parameter."""
        return dist.get_world_size(self._groups.expert_replicas if is_expert(parameter) else self._groups.replicas)

    def squares(self, values: Iterable[LocalValues]) -> Tensor:
        """Σx² over every distinct element in the world, [parts] in fp64 in host memory. All ranks call this together.

        One copy to the host serves all who read the norms, and gradients in host memory can be scaled by them.
        """
        held = {self._device: self._nothing(self._device)}
        for parameter, tensor, holders in values:
            split = getattr(parameter, "tensor_model_parallel", False)
            if (split or self._groups.tensor_rank == 0) and not getattr(parameter, "ds_pipe_replicated", False):
                square = torch.linalg.vector_norm(tensor.float()).double().square() / holders
                if square.device not in held:
                    held[square.device] = self._nothing(square.device)
                held[square.device][self._part_of[parameter]] += square
        sums = held.pop(self._device)
        for others in held.values():  # of what is offloaded
            sums += others.to(self._device)
        dist.all_reduce(sums)
        return sums.cpu()

    def _nothing(self, device: torch.device) -> Tensor:
        return torch.zeros(len(self._names), dtype=torch.float64, device=device)

    def by_part(self, squares: Tensor) -> dict[str, float]:
        """The norm of each part, from what `squares` returned."""
        return dict(zip(self._names, squares.sqrt().tolist(), strict=True))


def global_norm(squares: Tensor) -> Tensor:
    """The norm over all parts, in fp32, in which DeepSpeed decides whether it is finite."""
    return squares.sum().sqrt().float()
