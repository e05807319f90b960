"""A rank's parameters as pieces of logical tensors: loaded from a source, iterated, and served with LoRA merged."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lockstep.distributed.checkpoint.tensors import (
    Box,
    Piece,
    Source,
    WeightsOnly,
    concurrently,
    digest,
    read_tensor,
    to_numpy,
)
from lockstep.distributed.world.groups import Groups
from lockstep.model.layers.lora import Adapter, Adapters
from lockstep.model.transformer import Transformer
from lockstep.model.weights.lora import merge
from lockstep.model.weights.names import EMBEDDING, HEAD, is_adapter, logical_tensors, part_sizes
from lockstep.model.weights.sharding import is_stack, parameter_pieces


def pieces(transformer: Transformer) -> Iterator[tuple[nn.Parameter, Piece]]:
    """Every piece of a logical tensor that this rank holds, with its parameter."""
    groups, shapes = transformer.groups, logical_tensors(transformer.model)
    tensor, expert = (groups.tensor_rank, groups.layout.tensor), (groups.expert_rank, groups.layout.expert)
    for path, parameter in transformer.named_parameters():
        for piece in parameter_pieces(path, transformer.model, shapes, tensor, expert):
            yield parameter, _held(path, piece, groups)


def pieces_by_parameter(transformer: Transformer) -> dict[nn.Parameter, list[Piece]]:
    """The pieces in each of this rank's parameters."""
    held: dict[nn.Parameter, list[Piece]] = {parameter: [] for parameter in transformer.parameters()}
    for parameter, piece in pieces(transformer):
        held[parameter].append(piece)
    return held


def _held(path: str, piece: Piece, groups: Groups) -> Piece:
    """The piece, marked whether it is the first of its copies, and whether this rank owns it."""
    if is_stack(path):
        return replace(piece, owned=groups.owns_experts)
    first = piece.first and (groups.is_first_stage or piece.name != EMBEDDING)
    return replace(piece, first=first, owned=first and groups.owns_replicated)


@dataclass(frozen=True)
class Served:
    """A piece of the merged model: this rank's piece of a weight, with the LoRA adapter to merge into it."""

    parameter: nn.Parameter
    piece: Piece
    adapter: Adapter | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return len(range(*self.piece.box[0]))

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first … last−1 of the merged piece, in the parameter's dtype."""
        weight = self.piece.view(self.parameter)[first:last]
        if self.adapter is None:
            return weight
        return merge(weight, self.adapter.a.detach(), self.adapter.b.detach()[first:last], self.adapter.scale)


def served(transformer: Transformer) -> Iterator[Served]:
    """Every piece of this rank with LoRA merged, for consumers without adapters: rollouts, and a reference's copy."""
    named = dict(transformer.named_parameters())
    adapters = {path: module for path, module in transformer.named_modules() if isinstance(module, Adapters)}
    paths = {parameter: path for path, parameter in named.items()}
    for parameter, piece in pieces(transformer):
        if is_adapter(piece.name):
            continue
        path, kind = paths[parameter].rsplit(".", 1)
        beside = adapters.get(f"{path}.adapters") if kind == "weight" else None
        yield Served(parameter, piece, beside.of(piece.name.split(".")[-2]) if beside else None)


def parts(transformer: Transformer) -> dict[str, list[nn.Parameter]]:
    """This rank's parameters of each part of the whole model: see `part_sizes`."""
    found: dict[str, list[nn.Parameter]] = {part: [] for part in part_sizes(transformer.model)}
    for path, parameter in transformer.named_parameters():
        module, index, *_ = path.split(".")
        found[f"layers.{index}" if module == "blocks" else module].append(parameter)
    return found


@torch.no_grad()
def load(transformer: Transformer, source: Source) -> None:
    """Load every parameter of this rank from a source, written in any layout; padding becomes 0."""
    held = list(pieces(transformer))
    for parameter, piece in held:
        if piece.name in (EMBEDDING, HEAD):
            parameter[piece.local[0][1] :] = 0

    def read(parameter: nn.Parameter, piece: Piece) -> None:
        read_tensor(source, piece.name, piece.box, piece.view(parameter))

    concurrently(lambda pair: read(*pair), held)


def slice_digests(transformer: Transformer) -> dict[str, str]:
    """Digests of the weights of this rank by logical slice: those that two ranks hold have one name."""
    return {
        f"{piece.name}[{', '.join(f'{start}:{stop}' for start, stop in piece.box)}]": digest(
            to_numpy(piece.view(parameter))
        )
        for parameter, piece in pieces(transformer)
    }


class LocalWeights(WeightsOnly):
    """A `Source` over the pieces in a transformer's own parameters, adapters included."""

    def __init__(self, transformer: Transformer) -> None:
        held = pieces(transformer)
        self._arrays = {(piece.name, piece.box): to_numpy(piece.view(parameter)) for parameter, piece in held}

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`; `box` must be that of a piece which this rank holds."""
        return self._arrays[name, box]
