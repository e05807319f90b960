"""LoRA: low-rank adapters of linear layers, W + scale · B · A, where A and B learn and W may be frozen.

Hu et al. 2021. Each logical projection has an adapter of its own, though q, k and v, and gate and up, lie in one
parameter: so adapters are the same in any layout, and names and shapes are PEFT's. In fast numerics an adapter is two
thin products beside the layer's own. In exact numerics the layer computes with the merged weight, which is what
rollouts are sent, so that both keep giving the same bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lockstep.distributed.libraries import tensor_parallel
from lockstep.distributed.world.groups import Groups
from lockstep.model.config import LoraConfig, ModelConfig
from lockstep.model.layers.linear import ColumnLinear, RowLinear, mark, reduced, sequence_group, summed_over
from lockstep.model.ops.linear import project
from lockstep.model.weights.lora import merge
from lockstep.model.weights.names import logical_tensors
from lockstep.model.weights.sharding import parameter_pieces


class Adapter(nn.Module):
    """The LoRA adapter of one projection: A, B and the scale, or this tensor rank's part of them."""

    def __init__(self, outputs: int, inputs: int, lora: LoraConfig, groups: Groups, dtype: torch.dtype) -> None:
        super().__init__()
        self._group, self._parts, self.scale = groups.tensor, sequence_group(groups), lora.scale
        self.a = nn.Parameter(torch.empty(lora.rank, inputs, dtype=dtype))
        self.b = nn.Parameter(torch.empty(outputs, lora.rank, dtype=dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, to be merged; the one that every tensor rank holds whole gets the sum of their gradients."""
        raise NotImplementedError


class ColumnAdapter(Adapter):
    """The adapter of a `ColumnLinear`: every tensor rank holds all of A, and its rows of B."""

    def __init__(self, outputs: int, inputs: int, lora: LoraConfig, groups: Groups, dtype: torch.dtype) -> None:
        super().__init__(outputs, inputs, lora, groups, dtype)
        mark(self.b, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[T / ranks if sequence, 1, inputs] → [T, 1, outputs / ranks]."""
        inner = project(x, summed_over(self.a, self._parts))
        if self._parts is None:
            inner = tensor_parallel.copy_to_tensor_model_parallel_region(inner, self._group)
        else:
            inner = tensor_parallel.gather_from_sequence_parallel_region(inner, group=self._group)
        return project(inner, self.b) * self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """See `Adapter`."""
        return summed_over(self.a, self._group), self.b


class RowAdapter(Adapter):
    """The adapter of a `RowLinear`: every tensor rank holds its columns of A, and all of B."""

    def __init__(self, outputs: int, inputs: int, lora: LoraConfig, groups: Groups, dtype: torch.dtype) -> None:
        super().__init__(outputs, inputs, lora, groups, dtype)
        mark(self.a, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1, inputs / ranks] → [T / ranks if sequence, 1, outputs]."""
        inner = reduced(project(x, self.a), self._group, self._parts is not None, "fast")
        return project(inner, summed_over(self.b, self._parts)) * self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """See `Adapter`."""
        return self.a, summed_over(self.b, self._group)


class Adapters(nn.ModuleDict):
    """The adapters of a linear layer, by projection; the projections' weights are stacked in the layer's weight."""

    def __init__(self, rows: dict[str, int], adapters: dict[str, Adapter]) -> None:
        """
        Args:
            rows: of every projection in the layer's weight, in their order there; some have adapters.
        """
        super().__init__(adapters)
        self._rows, self.on = rows, True

    def of(self, projection: str) -> Adapter | None:
        """The adapter of a projection, or None."""
        found = self._modules.get(projection)
        assert found is None or isinstance(found, Adapter)
        return found

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output for x with the adapters' part added to `out`, its output without."""
        parts = zip(self._rows, out.split([*self._rows.values()], dim=-1), strict=True)
        changed = [part if (adapter := self.of(name)) is None else part + adapter(x) for name, part in parts]
        return changed[0] if len(changed) == 1 else torch.cat(changed, dim=-1)

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with the adapters merged into it; all factors get gradients."""
        parts = []
        for name, part in zip(self._rows, weight.split([*self._rows.values()]), strict=True):
            adapter = self.of(name)
            parts.append(part if adapter is None else merge(part, *adapter.factors(), adapter.scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_adapters(blocks: nn.ModuleDict, model: ModelConfig, groups: Groups, dtype: torch.dtype) -> None:
    """Add the adapters that a model's configuration names, if any, to the linear layers of its blocks."""
    if model.lora is None:
        return
    shapes, tensor = logical_tensors(model), (groups.tensor_rank, groups.layout.tensor)
    for path, layer in blocks.named_modules():
        if not isinstance(layer, ColumnLinear | RowLinear):
            continue
        kind = ColumnAdapter if isinstance(layer, ColumnLinear) else RowAdapter
        pieces = list(parameter_pieces(f"blocks.{path}.weight", model, shapes, tensor))
        sizes = {p.name.split(".")[-2]: (len(range(*p.local[0])), len(range(*p.local[1]))) for p in pieces}
        adapters: dict[str, Adapter] = {
            name: kind(*size, model.lora, groups, dtype) for name, size in sizes.items() if name in model.adapted
        }
        if adapters:
            layer.adapters = Adapters({name: rows for name, (rows, _) in sizes.items()}, adapters)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Within this block a model computes without its adapters: bit for bit as the model that it was made from."""
    found = [m for m in module.modules() if isinstance(m, Adapters)]
    before = [adapters.on for adapters in found]
    for adapters in found:
        adapters.on = False
    try:
        yield
    finally:
        for adapters, on in zip(found, before, strict=True):
            adapters.on = on
