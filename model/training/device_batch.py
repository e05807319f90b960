"""A packed row on this rank's device: its tokens, attention and loss inputs, split over context ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lockstep.data.batch import Ints, TokenBatch, part, sequences_of
from lockstep.distributed.context_parallel import zigzag_indices
from lockstep.distributed.device import sent
from lockstep.distributed.pipeline import Stage
from lockstep.distributed.world.groups import Groups
from lockstep.model.attention.context_parallel import attention
from lockstep.model.attention.spec import Attend
from lockstep.model.config import Numerics
from lockstep.model.layers.moe import Sequences
from lockstep.model.layers.routing import Replay, Route
from lockstep.model.loading import transformer_of
from lockstep.model.objectives.objective import LossInputs, loss_inputs


@dataclass(frozen=True)
class DeviceBatch:
    """This rank's part of a row of tokens on its device, with its attention and its predictions."""

    tokens: Tensor
    positions: Tensor
    predictors_K: Tensor
    targets_K: Tensor
    loss_inputs: LossInputs
    attend: Attend
    sequences: Sequences
    route: Route | None = None
    """To the recorded experts of a row that has some."""


def to_device(
    batch: TokenBatch,
    groups: Groups,
    kv_heads: int,
    device: torch.device,
    numerics: Numerics = "fast",
    layers: Sequence[int] = (),
    differing: Tensor | None = None,
) -> DeviceBatch:
    """This rank's part of a row, as tensors on its device.

    Args:
        layers: of this rank, whose recorded experts tokens go to.
        differing: see `counts` of `Replay`.
    """
    attend = attention(batch.documents, groups, kv_heads, device, numerics)
    places = places_of(batch, groups)
    local, (document_T, weight_D) = part(batch, places), sequences_of(batch)

    def tensor(name: str) -> Tensor:
        return sent(torch.tensor(getattr(local, name)), device)

    return DeviceBatch(
        tokens=tensor("tokens"),
        positions=tensor("positions"),
        predictors_K=tensor("predictors"),
        targets_K=tensor("targets"),
        loss_inputs=loss_inputs(local, device, groups.context if groups.layout.context > 1 else None),
        attend=attend,
        sequences=Sequences(*(sent(torch.tensor(column), device) for column in (document_T[places], weight_D))),
        route=_replay(local, layers, device, differing),
    )


def _replay(local: TokenBatch, layers: Sequence[int], device: torch.device, differing: Tensor | None) -> Replay | None:
    if local.experts is None:
        return None
    return Replay(sent(torch.from_numpy(local.experts[:, list(layers)]), device), layers, differing)


def places_of(batch: TokenBatch, groups: Groups) -> Ints:
    """Indices of the row's tokens that this context rank computes."""
    if groups.layout.context == 1:
        return np.arange(len(batch.tokens))
    return zigzag_indices(len(batch.tokens), groups.layout.context, groups.context_rank).numpy()


@dataclass(frozen=True)
class DeviceRows(Sequence[DeviceBatch]):
    """This rank's parts of rows, each moved to the device when a schedule takes it, so that few are there at a time."""

    stage: Stage
    groups: Groups
    rows: Sequence[TokenBatch]
    reference_logp: Sequence[Tensor] = ()
    """[K] of each row, instead of those in the rows; empty for those in the rows."""
    differing: Tensor | None = None
    """See `counts` of `Replay`; None where nobody counts."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> DeviceBatch:  # type: ignore[override]
        transformer = transformer_of(self.stage)
        device = next(transformer.parameters()).device
        kv_heads, numerics = transformer.model.kv_heads, transformer.numerics
        layers = [layer for part in transformer.layers for layer in part]
        batch = to_device(self.rows[index], self.groups, kv_heads, device, numerics, layers, self.differing)
        if not self.reference_logp:
            return batch
        return replace(batch, loss_inputs=replace(batch.loss_inputs, reference_logp=self.reference_logp[index]))


def longest_document(rows: Sequence[TokenBatch]) -> int:
    """Tokens of the longest row: the length that pipeline stages exchange."""
    return max(len(row.tokens) for row in rows)
