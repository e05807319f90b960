"""Weights from the policy to the rollout workers, as numbered versions that both sides sign with digests."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from torch import Tensor

from lockstep.distributed.checkpoint.tensors import Box, Piece, WeightsOnly, digest, overlap, to_numpy, to_torch, within
from lockstep.model.state_dict import Served, pieces, served
from lockstep.model.transformer import Transformer
from lockstep.model.weights.names import EMBEDDING, HEAD


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
    def shape(self) -> tuple[int, ...]:
        """Of the piece."""
        return tuple(stop - start for start, stop in self.box)

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.bits.dtype.itemsize

    @property
    def array(self) -> NDArray[Any]:
        """The piece in its own dtype, without a copy."""
        return self.bits.view(bfloat16) if self.is_bfloat16 else self.bits


def shards_of(transformer: Transformer) -> list[Shard]:
    """The pieces that this rank owns, signed; adapters are in them."""
    return [signed_rows((each, 0, len(each))) for each in served(transformer) if each.piece.owned]


Part = tuple[Served, int, int]
"""Rows of a piece, on its first dim, with its adapter merged."""


def messages_of(transformer: Transformer, size: int) -> list[list[Part]]:
    """What this rank owns in messages of at most `size` bytes; a larger piece is cut between rows, a row never."""
    messages: list[list[Part]] = []
    filled = size
    for each in served(transformer):
        if not each.piece.owned:
            continue
        row = each.parameter.element_size() * math.prod(b - a for a, b in each.piece.box[1:])
        step = max(1, size // row)
        for first in range(0, len(each), step):
            last = min(first + step, len(each))
            if filled + (last - first) * row > size:
                messages, filled = [*messages, []], 0
            messages[-1].append((each, first, last))
            filled += (last - first) * row
    return messages


def signed(message: Sequence[Part]) -> list[Shard]:
    """The shards of a message."""
    return [signed_rows(part) for part in message]


def signed_rows(part: Part) -> Shard:
    """A part as a shard."""
    each, first, last = part
    (start, _), *rest = each.piece.box
    return _signed(each.piece.name, ((start + first, start + last), *rest), to_numpy(each.rows(first, last)))


def _signed(name: str, box: Box, array: NDArray[Any]) -> Shard:
    is_bfloat16 = array.dtype == bfloat16
    bits = array.view(np.uint16) if is_bfloat16 else array
    return Shard(name, box, bits, is_bfloat16, digest(bits))


class Held(WeightsOnly):
    """A `Source` over the pieces that a transformer itself holds, those of adapters among them."""

    def __init__(self, transformer: Transformer) -> None:
        held = pieces(transformer)
        self._arrays = {(piece.name, piece.box): to_numpy(piece.view(parameter)) for parameter, piece in held}

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        return self._arrays[name, box]


@dataclass
class _Target:
    """A piece of this rank's parameters, and what has come of it."""

    piece: Piece
    held: Tensor
    came: list[Box] = field(default_factory=list)

    def mark(self, box: Box) -> None:
        """Note that a part has come.

        Raises:
            WeightsDiffer: when some of it had come before: counts alone would let it stand for a part that is missing.
        """
        for other in self.came:
            if overlap(other, box):
                raise WeightsDiffer(f"{self.piece.name} {box} came, and {other} of it before: send each part once")
        self.came.append(box)

    def check(self) -> None:
        """Be sure that all of it has come, no part of which came twice.

        Raises:
            WeightsDiffer: says how much is missing.
        """
        filled, size = sum(map(_size, self.came)), _size(self.piece.box)
        if filled != size:
            raise WeightsDiffer(f"the policy sent {filled} of {size} elements of {self.piece.name} {self.piece.box}")


class Receiver:
    """Fills the parameters of a transformer, in any layout, from messages of shards that came from any other.

    Every parameter is poisoned first, so that a tensor that is not filled cannot pass for the old one. What has been
    written is read back and compared with what the policy signed.
    """

    def __init__(self, transformer: Transformer) -> None:
        self._targets: dict[str, list[_Target]] = defaultdict(list)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.fill_(float("nan"))
            for parameter, piece in pieces(transformer):
                if piece.name in (EMBEDDING, HEAD):
                    parameter[piece.local[0][1] :] = 0
                self._targets[piece.name].append(_Target(piece, piece.view(parameter).detach()))

    def take(self, shards: Sequence[Shard]) -> None:
        """Write what this rank holds of some shards.

        Raises:
            WeightsDiffer: when bits differ from those that were signed, or a part comes twice.
        """
        for shard in shards:
            for target in self._targets[shard.name]:
                common = overlap(shard.box, target.piece.box)
                if common:
                    target.mark(common)
                    _write(shard, target, common)

    def close(self) -> None:
        """Be sure that everything has been filled.

        Raises:
            WeightsDiffer: names what is missing.
        """
        for targets in self._targets.values():
            for target in targets:
                target.check()


def _write(shard: Shard, target: _Target, common: Box) -> None:
    """Copy a part and read it back: as a whole shard its digest says all, of a part the bits are compared as well."""
    sent, held = shard.array[within(common, shard.box)], target.held[within(common, target.piece.box)]
    held.copy_(to_torch(sent))
    back = to_numpy(held)
    if common == shard.box:
        same = back.dtype == sent.dtype and digest(back) == shard.digest
    else:
        same = back.dtype == sent.dtype and digest(back) == digest(sent) and digest(shard.bits) == shard.digest
    if not same:
        raise WeightsDiffer(f"{shard.name} {shard.box} differs from what the policy sent")


def _size(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def receive(transformer: Transformer, shards: Sequence[Shard]) -> None:
    """Fill a transformer from shards in one message; see `Receiver`.

    Raises:
        WeightsDiffer: when a tensor is missing or its bits differ.
    """
    receiver = Receiver(transformer)
    receiver.take(shards)
    receiver.close()
