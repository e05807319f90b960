"""Receiver: fills a transformer's parameters from shards of any other layout, and compares digests."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lockstep.distributed.checkpoint.tensors import Box, Piece, digest, overlap, to_numpy, to_torch, within
from lockstep.model.state_dict import pieces
from lockstep.model.transformer import Transformer
from lockstep.model.weights.names import EMBEDDING, HEAD
from lockstep.rl.weight_sync.shards import Shard, WeightsDiffer


@dataclass
class _Target:
    """A piece of this rank's parameters, and the boxes of it that have been received."""

    piece: Piece
    held: Tensor
    came: list[Box] = field(default_factory=list)

    def mark(self, box: Box) -> None:
        """Records that a part has been received.

        Raises:
            WeightsDiffer: when some of it had come before: counts alone would let it stand for a part that is missing.
        """
        for other in self.came:
            if overlap(other, box):
                raise WeightsDiffer(f"{self.piece.name} {box} came, and {other} of it before: send each part once")
        self.came.append(box)

    def check(self) -> None:
        """Checks that the whole piece has been received.

        Raises:
            WeightsDiffer: says how much is missing.
        """
        filled, size = sum(map(_size, self.came)), _size(self.piece.box)
        if filled != size:
            raise WeightsDiffer(f"the policy sent {filled} of {size} elements of {self.piece.name} {self.piece.box}")


class Receiver:
    """Fills the parameters of a transformer in any layout from messages of shards of any other.

    Every parameter is set to NaN first, so that a tensor that is not filled cannot pass for the old one. What has been
    written is read back and compared with the sender's digests.
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
        """Writes the parts of shards that this rank holds.

        Raises:
            WeightsDiffer: when bits differ from the sender's digests, or a part comes twice.
        """
        for shard in shards:
            for target in self._targets[shard.name]:
                common = overlap(shard.box, target.piece.box)
                if common:
                    target.mark(common)
                    _write(shard, target, common)

    def close(self) -> None:
        """Checks that every parameter has been filled.

        Raises:
            WeightsDiffer: names what is missing.
        """
        for targets in self._targets.values():
            for target in targets:
                target.check()


def _write(shard: Shard, target: _Target, common: Box) -> None:
    """Copies a part and reads it back: a whole shard is checked by its digest, a part of one by its bits as well."""
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
    """Fills a transformer from shards in one message; see `Receiver`.

    Raises:
        WeightsDiffer: when a tensor is missing or its bits differ.
    """
    receiver = Receiver(transformer)
    receiver.take(shards)
    receiver.close()
