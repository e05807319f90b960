"""Shards: pieces of the policy's weights with digests, packed into messages for rollout workers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.tensors import Box, digest, to_numpy
from lockstep.model.state_dict import Served, served
from lockstep.model.transformer import Transformer
from lockstep.rl.weight_sync.protocol import Shard


def shards_of(transformer: Transformer) -> list[Shard]:
    """All pieces that this rank owns, as shards; LoRA adapters are merged into them."""
    return [signed_rows((each, 0, len(each))) for each in served(transformer) if each.piece.owned]


Part = tuple[Served, int, int]
"""A piece and a range of its rows (first dim), whose LoRA adapter is merged when they are read."""


def messages_of(transformer: Transformer, size: int) -> list[list[Part]]:
    """Packs what this rank owns into messages of at most `size` bytes.

    A larger piece is cut between rows; a row that is larger than `size` is a message of its own.
    """
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
    """Reads the parts of a message as shards, with digests."""
    return [signed_rows(part) for part in message]


def signed_rows(part: Part) -> Shard:
    """Reads one part as a shard, with its digest."""
    each, first, last = part
    (start, _), *rest = each.piece.box
    return _signed(each.piece.name, ((start + first, start + last), *rest), to_numpy(each.rows(first, last)))


def _signed(name: str, box: Box, array: NDArray[Any]) -> Shard:
    is_bfloat16 = array.dtype == bfloat16
    bits = array.view(np.uint16) if is_bfloat16 else array
    return Shard(name, box, bits, is_bfloat16, digest(bits))
