"""Paged KV caches of exact numerics, whose attention has the same bits as the trainer's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.model.attention.exact import KEYS, attend_exactly
from lockstep.model.attention.kv_cache import KVCache, PagedAttention, Span
from lockstep.model.attention.paged_kernel import BLOCK, serves
from lockstep.model.attention.spec import PLAIN, Attend, AttentionSpec
from lockstep.model.config import ModelConfig


def exact_cache(model: ModelConfig, *, dtype: torch.dtype, device: torch.device, **sizes: Any) -> KVCache:
    """A KV cache whose attention has the same bits as the trainer's; see `KVCache` for the arguments."""
    of_blocks = ExactKVCache if serves(dtype, device, model.head_dim) else GatheredKVCache
    return of_blocks(model, dtype=dtype, device=device, **sizes)


class ExactKVCache(KVCache):
    """A KV cache that the paged CPU kernel reads in place, token by token."""

    def attention(self, spans: Sequence[Span]) -> Attend:
        """See `KVCache`."""
        return PagedAttention(self, spans, numerics="exact")


class GatheredKVCache(KVCache):
    """A KV cache whose blocks are gathered into contiguous rows [tokens, head width] before each product."""

    def _shapes(self, dtype: torch.dtype, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (BLOCK, width), (BLOCK, width)

    def write(self, layer: int, blocks_T: Tensor, offsets_T: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> None:
        """See `KVCache`."""
        self.keys[layer][blocks_T, :, offsets_T] = k_TGE
        self.values[layer][blocks_T, :, offsets_T] = v_TGE

    def gathered(self, layer: int, tables_NP: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCache`."""
        heads = self.keys[layer].shape[1]
        lines_NGP = tables_NP[:, None] * heads + torch.arange(heads, device=tables_NP.device)[:, None]
        keys, values = (x[layer].flatten(0, 1)[lines_NGP].flatten(2, 3) for x in (self.keys, self.values))
        return keys, values

    def attention(self, spans: Sequence[Span]) -> "GatheredAttention":
        """See `KVCache`."""
        return GatheredAttention(self, spans)


@dataclass(frozen=True)
class _Batch:
    """Spans of as many tokens each, as `attend_exactly` takes them."""

    rows_NL: Tensor
    """Places in the pass."""
    tables_NP: Tensor
    """Blocks from the first key on; its last block where a sequence has none."""
    first_N: Tensor
    keys_from_N: Tensor


class GatheredAttention:
    """`Attend` for spans of sequences, concatenated: writes their keys and values to the cache, then attends to it.

    Single tokens of sequences of similar lengths are one batch, and every longer span is one by itself.
    """

    def __init__(self, cache: GatheredKVCache, spans: Sequence[Span]) -> None:
        self._cache, device = cache, cache.values[0].device
        starts = np.cumsum([0, *(s.count for s in spans)]).tolist()
        places = list(zip(starts, spans, strict=False))
        alike = [*_alike([(i, s) for i, s in places if s.count == 1]), *([(i, s)] for i, s in places if s.count > 1)]
        kinds = range(len(cache.windows))
        self._batches = [[_batch(cache, kind, each, device) for each in alike] for kind in kinds]
        positions = [np.arange(s.start, s.start + s.count) for s in spans]
        self._offsets = torch.from_numpy(np.concatenate(positions) % BLOCK).to(device)
        self._blocks = []
        for kind in kinds:
            pairs = zip(spans, positions, strict=True)
            blocks = [np.asarray(span.tables[kind])[position // BLOCK] for span, position in pairs]
            self._blocks.append(torch.from_numpy(np.concatenate(blocks)).to(device))

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        """See `Attend`."""
        kind = self._cache.kind_of[layer]
        self._cache.write(layer, self._blocks[kind], self._offsets, k_TGE, v_TGE)
        mixed = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
        for batch in self._batches[kind]:
            k, v = self._cache.gathered(layer, batch.tables_NP)
            q = q_THE[batch.rows_NL]
            mixed[batch.rows_NL] = attend_exactly(q, k, v, batch.first_N, spec, batch.keys_from_N)
        return mixed


def _alike(places: Sequence[tuple[int, Span]]) -> list[list[tuple[int, Span]]]:
    """Batches by length; in each the shortest sequence has at least half of the keys that all are padded to."""
    batches: list[list[tuple[int, Span]]] = []
    for place in sorted(places, key=lambda place: place[1].start):
        if not batches or place[1].start >= 2 * max(batches[-1][0][1].start, KEYS):
            batches.append([])
        batches[-1].append(place)
    return batches


def _batch(cache: GatheredKVCache, kind: int, spans: Sequence[tuple[int, Span]], device: torch.device) -> _Batch:
    window = cache.windows[kind]
    seen = [0 if window is None else max(0, s.start - window + 1) for _, s in spans]
    begins = [position // KEYS * (KEYS // BLOCK) for position in seen]
    stops = [-(-(s.start + s.count) // BLOCK) for _, s in spans]
    most = max(b - a for a, b in zip(begins, stops, strict=True))
    tables = np.zeros((len(spans), most + -most % (KEYS // BLOCK)), np.int64)
    for place, (_, span), begin, stop in zip(tables, spans, begins, stops, strict=True):
        held, last = np.asarray(span.tables[kind][begin:stop]), span.tables[kind][stop - 1]
        place[:], place[: stop - begin] = last, np.where(held < 0, last, held)  # those behind the window are given back
    rows = torch.tensor([i for i, _ in spans])[:, None] + torch.arange(spans[0][1].count)
    first, keys_from = torch.tensor([s.start for _, s in spans]), torch.tensor(begins) * BLOCK
    return _Batch(*(x.to(device) for x in (rows, torch.from_numpy(tables), first, keys_from)))
