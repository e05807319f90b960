"""Assembles whole zarr chunks from sharded state. Each chunk is written by exactly one rank that holds part of it.

ZeRO partitions flattened parameters anywhere, and chunks lie on a grid. The replica that holds most of a chunk writes
it, and the others send theirs in one all-to-all for each device; so no rank holds more than its share and a few chunks.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.distributed.checkpoint.arrays import Chunk, chunk_shape
from lockstep.distributed.checkpoint.tensors import Box, Piece, Source, read_tensor, state_name, to_torch, whole
from lockstep.distributed.world.collectives import all_to_all

WEIGHTS = "weights"
"""The kind of values that are weights and not optimizer state."""


@dataclass(frozen=True)
class FlatShard:
    """The consecutive elements of a flattened parameter that this rank holds, with their optimizer state."""

    parameter: nn.Parameter
    shape: torch.Size
    """Of the parameter; its own shape is empty where ZeRO-3 has split it."""
    cuts: tuple[int, ...]
    """[replicas + 1] where the elements of each replica begin, and where the last ones end; two where each has all."""
    group: dist.ProcessGroup
    """The replicas."""
    values: Mapping[str, Tensor]
    """This rank's elements, flat, by kind of value; the same kinds on every replica."""


def parts_of(piece: Piece, shape: Sequence[int], item_bytes: int) -> Iterator[tuple[Box, tuple[int, int]]]:
    """The chunks that a piece consists of, and where each begins and ends in its flattened parameter.

    Args:
        shape: of the parameter.
    """
    rows, row = piece.box[0][1] - piece.box[0][0], math.prod(b - a for a, b in piece.box[1:])
    step, base = chunk_shape(piece.shape, piece.tile, item_bytes)[0], flat_start(piece, shape)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        box = ((piece.box[0][0] + first, piece.box[0][0] + last), *piece.box[1:])
        yield box, (base + first * row, base + last * row)


def flat_start(piece: Piece, shape: Sequence[int]) -> int:
    """The offset of a piece in its flattened parameter; a piece spans all of the parameter's trailing dims."""
    split = next((i for i, (a, b) in enumerate(piece.local) if b - a > 1), len(shape) - 1)
    assert all(piece.local[i] == (0, shape[i]) for i in range(split + 1, len(shape))), piece
    return sum(a * math.prod(shape[i + 1 :]) for i, (a, _) in enumerate(piece.local))


def whole_chunks(kept: Iterable[FlatShard], pieces: Mapping[nn.Parameter, Sequence[Piece]]) -> list[Chunk]:
    """The chunks that this rank is to write; all replicas call this together.

    Values are views where this replica holds the whole chunk, and copies elsewhere.
    """
    chunks: list[Chunk] = []
    exchanges: dict[tuple[dist.ProcessGroup, torch.device], _Exchange] = {}
    for each in kept:
        for piece in (p for p in pieces[each.parameter] if p.first):
            for kind, values in each.values.items():  # with offload, weights and their state are on two devices
                where = each.group, values.device
                exchange = exchanges.setdefault(where, _Exchange(*where))
                chunks += exchange.chunks(each, piece, kind, values)
    for exchange in exchanges.values():
        exchange.run()
    return chunks


class _Exchange:
    """The exchange of elements on one device between replicas after which each chunk is whole on one of them."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._rank, self._ranks, self._device = group, group.rank(), group.size(), device
        self._loads = [0] * self._ranks
        self._sent: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._awaited: defaultdict[int, list[Tensor]] = defaultdict(list)

    def chunks(self, kept: FlatShard, piece: Piece, kind: str, values: Tensor) -> Iterator[Chunk]:
        """The chunks of a piece that this rank writes; `run` fills in the parts that other replicas hold."""
        name = piece.name if kind == WEIGHTS else state_name(kind, piece.name)
        item = values.element_size()
        grid, run = chunk_shape(piece.shape, piece.tile, item), kept.cuts[self._rank] if len(kept.cuts) > 2 else 0
        for box, span in parts_of(piece, kept.shape, item):
            parts = self._parts(kept, span)
            owner = max(range(self._ranks), key=lambda rank: parts[rank][1] - parts[rank][0])
            start, stop = parts[self._rank]
            mine = values[start - run : stop - run]
            if owner == self._rank:
                whole = mine if (start, stop) == span else self._assembled(mine, span, parts)
                yield Chunk(name, piece.shape, grid, box, whole.view([b - a for a, b in box]))
            elif len(mine):
                self._sent[owner].append(mine)

    def _parts(self, kept: FlatShard, span: tuple[int, int]) -> list[tuple[int, int]]:
        """The part of a chunk that each replica writes or sends; where all hold it, the one with the least to write."""
        if len(kept.cuts) > 2 or self._ranks == 1:
            return [_common(span, run) for run in zip(kept.cuts, kept.cuts[1:], strict=False)]
        writer = self._loads.index(min(self._loads))
        self._loads[writer] += span[1] - span[0]
        return [span if rank == writer else (span[0], span[0]) for rank in range(self._ranks)]

    def _assembled(self, mine: Tensor, span: tuple[int, int], parts: Sequence[tuple[int, int]]) -> Tensor:
        """A buffer for a chunk with this rank's part in it; views for the other parts are noted."""
        room = mine.new_empty(span[1] - span[0])
        for rank, (start, stop) in enumerate(parts):
            place = room[start - span[0] : stop - span[0]]
            if rank == self._rank:
                place.copy_(mine)
            elif len(place):
                self._awaited[rank].append(place)
        return room

    def run(self) -> None:
        """Exchange the elements: one all-to-all."""
        if self._ranks == 1:
            return
        sent = [self._bytes(self._sent[rank]) for rank in range(self._ranks)]
        counts = [sum(t.numel() * t.element_size() for t in self._awaited[rank]) for rank in range(self._ranks)]
        arrived = all_to_all(torch.cat(sent), self._group, [len(s) for s in sent], counts)
        for rank, part in enumerate(arrived.split(counts)):
            places = self._awaited[rank]
            sizes = [t.numel() * t.element_size() for t in places]
            for place, values in zip(places, part.split(sizes), strict=True):
                place.view(torch.uint8).copy_(values)

    def _bytes(self, tensors: Sequence[Tensor]) -> Tensor:
        none = torch.empty(0, dtype=torch.uint8, device=self._device)
        return torch.cat([none, *(t.view(torch.uint8) for t in tensors)])


def _common(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The common part of two intervals, empty where there is none."""
    start = min(max(a[0], b[0]), a[1])
    return start, max(start, min(a[1], b[1]))


def fill(into: Tensor, start: int, shape: Sequence[int], pieces: Sequence[Piece], source: Source, kind: str) -> None:
    """Read elements of a flattened parameter from a source, from `start` on, as many as `into` has.

    Elements of no logical tensor (padding) become 0.

    Args:
        shape: of the parameter.
        pieces: of logical tensors in it.
    """
    parts = [(piece, *_common((start, start + len(into)), _span(piece, shape))) for piece in pieces]
    if sum(last - first for _, first, last in parts) < len(into):
        into.zero_()
    for piece, first, last in parts:
        if first < last:
            _read(into[first - start : last - start], piece, first - flat_start(piece, shape), source, kind)


def _span(piece: Piece, shape: Sequence[int]) -> tuple[int, int]:
    """Where a piece begins and ends in its flattened parameter."""
    start = flat_start(piece, shape)
    return start, start + math.prod(b - a for a, b in piece.box)


def _read(into: Tensor, piece: Piece, first: int, source: Source, kind: str) -> None:
    """Read the elements of a piece from `first` on; rows that are wanted in part are read as a whole."""
    name, (top, _), row = state_name(kind, piece.name), piece.box[0], math.prod(b - a for a, b in piece.box[1:])
    low, high = first // row, -(-(first + len(into)) // row)
    box = ((top + low, top + high), *piece.box[1:])
    if len(into) == (high - low) * row:
        read_tensor(source, name, box, into.view([b - a for a, b in box]))
    else:
        into.copy_(to_torch(source.read(name, box)).view(-1)[first - low * row :][: len(into)])


def chunks_of(tensor: Tensor, name: str) -> Iterator[Chunk]:
    """Split a whole logical tensor into chunks."""
    shape = tuple(tensor.shape)
    piece = Piece(name, shape, whole(shape), whole(shape), shape)
    grid = chunk_shape(shape, shape, tensor.element_size())
    for box, (start, stop) in parts_of(piece, shape, tensor.element_size()):
        yield Chunk(name, shape, grid, box, tensor.reshape(-1)[start:stop].view([b - a for a, b in box]))
