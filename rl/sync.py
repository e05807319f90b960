"""Weights from the policy to the rollout workers, as numbered versions that both sides sign with digests."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.spec import Box, WeightsOnly, digest, overlap, to_numpy, within
from lockstep.model.held import load, pieces
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
    found = []
    for parameter, piece in pieces(transformer):
        if piece.owned or not owned_only:
            array = to_numpy(piece.view(parameter))
            is_bfloat16 = array.dtype == bfloat16
            bits = array.view(np.uint16) if is_bfloat16 else array
            found.append(Shard(piece.name, piece.box, bits, is_bfloat16, digest(bits)))
    return found


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


def receive(transformer: Transformer, shards: Sequence[Shard]) -> None:
    """Fill a whole transformer from shards, then read it back and compare digests.

    Every parameter is poisoned first, so that a tensor that is not filled cannot pass for the old one.

    Raises:
        WeightsDiffer: when a tensor is missing or its bits differ.
    """
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.fill_(float("nan"))
    load(transformer, Shards(shards))
    held = {piece.name: piece.view(parameter) for parameter, piece in pieces(transformer)}
    for shard in shards:
        part = held[shard.name][tuple(slice(a, b) for a, b in shard.box)]
        array = to_numpy(part)
        if digest(array.view(np.uint16) if array.dtype == bfloat16 else array) != shard.digest:
            raise WeightsDiffer(f"{shard.name} {shard.box} differs from what the policy sent")
