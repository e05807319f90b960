"""Receiver: fills a transformer's parameters from shards of any other layout, and compares digests."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lockstep.distributed.checkpoint.tensors import Box, Piece, digest, overlap, to_numpy, to_torch, within
from lockstep.rl.weight_sync.protocol import Shard, WeightsDiffer


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
    """Fills tensors of any layout from messages of shards of any other.

    What has been written is read back and compared with the sender's digests, and `close` finds what did not come.
    """

    def __init__(self, pieces: Iterable[tuple[Tensor, Piece]]) -> None:
        """
        Args:
            pieces: pieces of logical tensors, with the tensors that hold them.
        """
        self._targets: dict[str, list[_Target]] = defaultdict(list)
        for held, piece in pieces:
            self._targets[piece.name].append(_Target(piece, piece.view(held)))

    def take(self, shards: Sequence[Shard]) -> None:
        """Writes the parts of shards that the tensors hold.

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
        """Checks that every tensor has been filled.

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
