"""The parameters of a transformer as what new weights are written into."""

from collections.abc import Sequence

import torch
from torch import nn

from lockstep.distributed.checkpoint.tensors import Piece
from lockstep.model.state_dict import pieces
from lockstep.model.transformer import Transformer
from lockstep.model.weights.names import EMBEDDING, HEAD
from lockstep.rl.weight_sync.protocol import Shard
from lockstep.rl.weight_sync.receiver import Receiver


@torch.no_grad()
def poisoned(transformer: Transformer) -> list[tuple[nn.Parameter, Piece]]:
    """Sets every parameter to NaN and the vocabulary's padding to 0; returns the pieces that a `Receiver` fills.

    A tensor that is not filled cannot pass for the old one.
    """
    for parameter in transformer.parameters():
        parameter.fill_(float("nan"))
    held = list(pieces(transformer))
    for parameter, piece in held:
        if piece.name in (EMBEDDING, HEAD):
            parameter[piece.local[0][1] :] = 0
    return held


def receive(transformer: Transformer, shards: Sequence[Shard]) -> None:
    """Fills a transformer from shards in one message; see `Receiver`.

    Raises:
        WeightsDiffer: when a tensor is missing or its bits differ.
    """
    receiver = Receiver(poisoned(transformer))
    receiver.take(shards)
    receiver.close()
