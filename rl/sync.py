"""Weights from the policy to the rollout workers, as numbered versions that both sides sign with digests."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from torch import Tensor, nn

from lockstep.distributed.checkpoint.spec import Box, Piece, WeightsOnly, digest, overlap, to_numpy, to_torch, within
from lockstep.model.held import pieces
from lockstep.model.names import EMBEDDING, HEAD
from lockstep.model.transformer import Transformer


class WeightsDiffer(RuntimeError):
    """A rollout worker does not hold the weights that the policy sent."""


@dataclass(frozen=True)
class Shard:
    """A piece of a logical tensor on its way; bfloat16 travels as its 16-bit patterns."""

    name: str
    box: Box
    bits: NDArray[Any]
    is_bfloat16: bool
    digest: str

    @property
    def array(self) -> NDArray[Any]:
        """The piece in its own dtype, without a copy."""
        return self.bits.view(bfloat16) if self.is_bfloat16 else self.bits


def shards_of(transformer: Transformer, *, owned_only: bool = True) -> list[Shard]:
    """The pieces that this rank owns, or all that it holds, signed."""
    held = (pair for pair in pieces(transformer) if pair[1].owned or not owned_only)
    return [_signed(piece.name, piece.box, to_numpy(piece.view(parameter))) for parameter, piece in held]


Part = tuple[nn.Parameter, Piece, int, int]
"""Rows of a piece, on its first dim."""


def messages_of(transformer: Transformer, size: int) -> list[list[Part]]:
    """What this rank owns in messages of at most `size` bytes; a larger piece is cut between rows, a row never."""
    messages: list[list[Part]] = []
    filled = size
    for parameter, piece in pieces(transformer):
        if not piece.owned:
            continue
        (start, stop), *rest = piece.box
        row = parameter.element_size() * math.prod(b - a for a, b in rest)
        step = max(1, size // row)
        for first in range(0, stop - start, step):
            last = min(first + step, stop - start)
            if filled + (last - first) * row > size:
                messages, filled = [*messages, []], 0
            messages[-1].append((parameter, piece, first, last))
            filled += (last - first) * row
    return messages


def signed(message: Sequence[Part]) -> list[Shard]:
    """The shards of a message."""
    found = []
    for parameter, piece, first, last in message:
        (start, _), *rest = piece.box
        part = to_numpy(piece.view(parameter)[first:last])
        found.append(_signed(piece.name, ((start + first, start + last), *rest), part))
    return found


def _signed(name: str, box: Box, array: NDArray[Any]) -> Shard:
    is_bfloat16 = array.dtype == bfloat16
    bits = array.view(np.uint16) if is_bfloat16 else array
    return Shard(name, box, bits, is_bfloat16, digest(bits))


class Shards(WeightsOnly):
    """A `Source` over shards that came from any layout."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._by_name: dict[str, list[Shard]] = defaultdict(list)
        for shard in shards:
            self._by_name[shard.name].append(shard)

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`.

        Raises:
            WeightsDiffer: when the shards do not cover the box.
        """
        parts = [(shard, common) for shard in self._by_name[name] if (common := overlap(shard.box, box))]
        if len(parts) == 1 and parts[0][1] == box:
            shard, common = parts[0]
            return shard.array[within(common, shard.box)]
        out = np.empty([b - a for a, b in box], parts[0][0].array.dtype if parts else np.float32)
        filled = 0
        for shard, common in parts:
            out[within(common, box)] = shard.array[within(common, shard.box)]
            filled += int(np.prod([b - a for a, b in common]))
        if filled != out.size:
            raise WeightsDiffer(f"the policy sent {filled} of {out.size} elements of {name} {box}")
        return out


class Held(WeightsOnly):
    """A `Source` over the pieces that a transformer itself holds."""

    def __init__(self, transformer: Transformer) -> None:
        self._shards = {(s.name, s.box): s for s in shards_of(transformer, owned_only=False)}

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        return self._shards[name, box].array


class Receiver:
    """Fills the parameters of a transformer, in any layout, from messages of shards that came from any other.

    Every parameter is poisoned first, so that a tensor that is not filled cannot pass for the old one. What has been
    written is read back and compared with what the policy signed.
    """

    def __init__(self, transformer: Transformer) -> None:
        self._pieces: dict[str, list[tuple[Piece, Tensor]]] = defaultdict(list)
        self._filled: dict[tuple[str, Box], int] = {}
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.fill_(float("nan"))
            for parameter, piece in pieces(transformer):
                if piece.name in (EMBEDDING, HEAD):
                    parameter[piece.local[0][1] :] = 0
                self._pieces[piece.name].append((piece, piece.view(parameter).detach()))
                self._filled[piece.name, piece.box] = 0

    def take(self, shards: Sequence[Shard]) -> None:
        """Write what this rank holds of some shards.

        Raises:
            WeightsDiffer: when bits differ from those that were signed.
        """
        for shard in shards:
            if digest(shard.bits) != shard.digest:
                raise WeightsDiffer(f"{shard.name} {shard.box} differs from what the policy sent")
            for piece, held in self._pieces[shard.name]:
                common = overlap(shard.box, piece.box)
                if common:
                    self._write(shard, piece, held, common)

    def _write(self, shard: Shard, piece: Piece, held: Tensor, common: Box) -> None:
        sent, target = shard.array[within(common, shard.box)], held[within(common, piece.box)]
        target.copy_(to_torch(sent))
        back = to_numpy(target)
        if back.dtype != sent.dtype or digest(back) != digest(sent):
            raise WeightsDiffer(f"{shard.name} {shard.box} differs from what the policy sent")
        self._filled[piece.name, piece.box] += target.numel()

    def close(self) -> None:
        """Be sure that everything has been filled.

        Raises:
            WeightsDiffer: names what is missing.
        """
        for (name, box), filled in self._filled.items():
            size = math.prod(b - a for a, b in box)
            if filled != size:
                raise WeightsDiffer(f"the policy sent {filled} of {size} elements of {name} {box}")


def receive(transformer: Transformer, shards: Sequence[Shard]) -> None:
    """Fill a transformer from shards in one message; see `Receiver`.

    Raises:
        WeightsDiffer: when a tensor is missing or its bits differ.
    """
    receiver = Receiver(transformer)
    receiver.take(shards)
    receiver.close()
