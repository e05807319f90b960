"""Packed attention under context parallelism: `Attend` by Ulysses or by a ring, for rows split over context ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.distributed.context_parallel import UlyssesExchange, ring_attention
from lockstep.distributed.device import sent
from lockstep.distributed.layout import splits_heads
from lockstep.distributed.world.groups import Groups
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.attention.spec import PLAIN, Attend, AttentionSpec
from lockstep.model.config import Numerics


def attention(
    documents: Sequence[Sequence[int]],
    groups: Groups,
    kv_heads: int,
    device: torch.device,
    numerics: Numerics = "fast",
) -> Attend:
    """The `Attend` of a packed row in a layout: without context parallelism, by Ulysses, or by a ring.

    Args:
        documents: of the whole row, see `DocumentAttention`.
        kv_heads: number of key-value heads of the whole model.
        numerics: exact where the layout has no ring: see `check_numerics`.
    """
    if groups.layout.context == 1:
        return DocumentAttention(documents, device, numerics)
    if splits_heads(groups.layout, kv_heads):
        return UlyssesAttention(documents, groups.context, device, numerics)
    return RingAttention(documents, groups.context, device)


class UlyssesAttention:
    """`Attend` by DeepSpeed-Ulysses: an all-to-all gives each rank the whole row with a part of the heads."""

    def __init__(
        self, documents: Sequence[Sequence[int]], group: dist.ProcessGroup, device: torch.device, numerics: Numerics
    ) -> None:
        self._whole = DocumentAttention(documents, device, numerics)
        self._exchange = UlyssesExchange(group, sum(map(sum, documents)), device)

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        """See `Attend`."""
        q, k, v = (self._exchange.to_heads(x) for x in (q_THE, k_TGE, v_TGE))
        return self._exchange.to_tokens(self._whole(layer, q, k, v, spec))


class RingAttention:
    """`Attend` by ring attention: keys and values are passed from rank to rank; it takes any number of heads."""

    def __init__(self, documents: Sequence[Sequence[int]], group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._length = group, sum(map(sum, documents))
        places = _places(documents)
        self._document_T, self._branch_T, self._position_T = (sent(torch.tensor(p), device) for p in places)

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        """See `Attend`."""

        def visible(queries: Tensor, keys: Tensor) -> Tensor:
            return self._visible(queries[:, None], keys[None], spec.window)

        return ring_attention(
            q_THE,
            k_TGE,
            v_TGE,
            visible=visible,
            length=self._length,
            group=self._group,
            scale=q_THE.shape[2] ** -0.5 if spec.scale is None else spec.scale,
            softcap=spec.cap or 0.0,
        )

    def _visible(self, queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
        branch, ahead = self._branch_T[keys], self._position_T[queries] - self._position_T[keys]
        related = (self._document_T[queries] == self._document_T[keys]) & (
            (branch == 0) | (branch == self._branch_T[queries])
        )
        return related & (ahead >= 0) & (ahead < (self._length if window is None else window))


def _places(documents: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int]]:
    """For each token of a row: its document, its branch (0 is the prompt) and its position in the document."""
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    for number, (prompt, *branches) in enumerate(documents):
        for branch, (start, tokens) in enumerate([(0, prompt), *((prompt, b) for b in branches)]):
            found[0].extend([number] * tokens)
            found[1].extend([branch] * tokens)
            found[2].extend(range(start, start + tokens))
    return found
