"""Keys and values of running sequences in blocks of a few tokens, and attention to them.

A sequence's tokens lie in the blocks of its table, wherever these are, so that sequences of any length share one pool
and equal beginnings are kept once. Layers with different windows keep different parts of a text, so each kind of layer
has a pool and a table of its own. In a block the keys of a head stand as [head width, tokens] and its values as
[tokens, head width]: read in place and in order, a processor's lanes hold the tokens of a block, then a head's width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.model.attention import DocumentAttention
from lockstep.model.config import ModelConfig
from lockstep.model.full_attention import PLAIN, Scoring, attend_in_full


class KVCache:
    """Blocks for the keys and values of a model's layers."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        kv_heads: int,
        blocks: Sequence[int],
        block: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            kv_heads: of this tensor rank.
            blocks: of each kind of layer; see `kinds`.
            block: tokens of a block.
        """
        self.block, self.windows = block, kinds(model)
        of_layer = [self.windows.index(model.window_of(layer)) for layer in range(model.layers)]
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        width = model.head_dim
        for kind, count in enumerate(blocks):
            layers = [layer for layer, k in enumerate(of_layer) if k == kind]
            keys = _zeros((len(layers), count, kv_heads, width, block), dtype, device)
            values = _zeros((len(layers), count, kv_heads, block, width), dtype, device)
            self.keys |= dict(zip(layers, keys, strict=True))
            self.values |= dict(zip(layers, values, strict=True))
        self.kind_of = of_layer

    def write(self, layer: int, blocks_T: Tensor, offsets_T: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> None:
        """Keep keys and values of tokens at places of blocks."""
        self.keys[layer][blocks_T, :, :, offsets_T] = k_TGE
        self.values[layer][blocks_T, :, offsets_T] = v_TGE

    def gathered(self, layer: int, tables_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, G, P · block, E] of tables of P blocks each."""
        keys, values = self.keys[layer][tables_NP], self.values[layer][tables_NP]
        return keys.permute(0, 2, 1, 4, 3).flatten(2, 3), values.transpose(1, 2).flatten(2, 3)

    def copy(self, kind: int, source: int, target: int) -> None:
        """Copy a block of one kind of layer over another."""
        for layer, of_layer in enumerate(self.kind_of):
            if of_layer == kind:
                self.keys[layer][target] = self.keys[layer][source]
                self.values[layer][target] = self.values[layer][source]


def kinds(model: ModelConfig) -> list[int | None]:
    """The windows of a model's layers, each once: None, for all tokens, first."""
    return sorted({model.window_of(layer) for layer in range(model.layers)}, key=lambda w: w or 0)


def block_bytes(model: ModelConfig, *, kv_heads: int, block: int, dtype: torch.dtype) -> list[int]:
    """Bytes of a block of each kind of layer."""
    windows = [model.window_of(layer) for layer in range(model.layers)]
    one = 2 * kv_heads * model.head_dim * block * dtype.itemsize
    return [one * windows.count(window) for window in kinds(model)]


@dataclass(frozen=True)
class Span:
    """Tokens of a sequence that one forward pass computes: start … start+count−1."""

    tables: Sequence[Sequence[int]]
    """For each kind of layer the sequence's blocks, as far as these tokens and what they see."""
    start: int
    count: int


class PagedAttention:
    """`Attend` for spans of sequences, head to tail: keys and values are kept first, then each token sees its own.

    A span may see what another one of the same pass computes, because each layer keeps everything before it looks.
    """

    def __init__(self, cache: KVCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        device = cache.values[0].device
        starts = np.cumsum([0, *(s.count for s in spans)])
        self._places = [
            _places(cache.block, [s.tables[k] for s in spans], spans, device) for k in range(len(cache.windows))
        ]
        self._rows = [(i, s) for i, s in zip(starts, spans, strict=False) if s.count == 1]
        self._fresh = [(i, s) for i, s in zip(starts, spans, strict=False) if s.count > 1 and s.start == 0]
        self._continued = [(i, s) for i, s in zip(starts, spans, strict=False) if s.count > 1 and s.start > 0]
        self._decode = (
            [_Decode(cache, kind, self._rows, device) for kind in range(len(cache.windows))] if self._rows else []
        )
        self._documents = DocumentAttention([(s.count,) for _, s in self._fresh], device) if self._fresh else None
        self._fresh_rows = _row_numbers(self._fresh, device)
        self._biases: dict[tuple[int, int | None], Tensor] = {}

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        """See `Attend`."""
        kind = self._cache.kind_of[layer]
        self._cache.write(layer, *self._places[kind], k_TGE, v_TGE)
        if self._documents and len(self._fresh_rows) == len(q_THE):
            return self._documents(layer, q_THE, k_TGE, v_TGE, scoring)
        if self._rows and len(self._rows) == len(q_THE):
            return self._decode[kind](layer, q_THE, scoring)
        mixed = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
        if self._rows:
            rows = self._decode[kind].rows
            mixed[rows] = self._decode[kind](layer, q_THE[rows], scoring)
        if self._documents:
            rows = self._fresh_rows
            mixed[rows] = self._documents(layer, q_THE[rows], k_TGE[rows], v_TGE[rows], scoring)
        for start, span in self._continued:
            here = slice(start, start + span.count)
            mixed[here] = self._attended(layer, kind, q_THE[here], span, scoring)
        return mixed

    def _attended(self, layer: int, kind: int, q_LHE: Tensor, span: Span, scoring: Scoring) -> Tensor:
        """One span of tokens that also see what is before them."""
        first = _first(span.start, scoring.window, self._cache.block)
        stop = -(-(span.start + span.count) // self._cache.block)
        table = torch.tensor([span.tables[kind][first:stop]], device=q_LHE.device)
        k, v = self._cache.gathered(layer, table)
        columns = torch.arange(first * self._cache.block, stop * self._cache.block, device=q_LHE.device)
        rows = torch.arange(span.start, span.start + span.count, device=q_LHE.device)[:, None]
        hidden = columns > rows
        if scoring.window is not None:
            hidden |= columns <= rows - scoring.window
        bias = torch.zeros(hidden.shape, device=q_LHE.device).masked_fill_(hidden, float("-inf"))
        q = q_LHE.transpose(0, 1)[None]
        if scoring.cap is not None:
            return attend_in_full(q, k, v, bias[None], scoring)[0].transpose(0, 1)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.to(q.dtype), scale=scoring.scale, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)


class _Decode:
    """Attention of single tokens to their sequences, gathered and padded to the longest."""

    def __init__(self, cache: KVCache, kind: int, rows: Sequence[tuple[int, Span]], device: torch.device) -> None:
        window = cache.windows[kind]
        self._cache = cache
        self.rows = torch.tensor([i for i, _ in rows], device=device)
        firsts = [_first(s.start, window, cache.block) for _, s in rows]
        stops = [s.start // cache.block + 1 for _, s in rows]
        width = max(b - a for a, b in zip(firsts, stops, strict=True))
        tables = np.zeros((len(rows), width), np.int64)
        for place, (_, span), first, stop in zip(tables, rows, firsts, stops, strict=True):
            place[: stop - first] = span.tables[kind][first:stop]
        self._tables = torch.from_numpy(tables).to(device)
        own = torch.tensor([s.start for _, s in rows])[:, None]
        columns = torch.tensor(firsts)[:, None] * cache.block + torch.arange(width * cache.block)
        hidden = columns > own
        if window is not None:
            hidden |= columns <= own - window
        self._bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).to(device)

    def __call__(self, layer: int, q_BHE: Tensor, scoring: Scoring) -> Tensor:
        """Mixed values [B, H, E]. The query heads of one key-value head stand as rows of one product."""
        k, v = self._cache.gathered(layer, self._tables)
        q = q_BHE.unflatten(1, (k.shape[1], -1))
        if scoring.cap is not None:
            return attend_in_full(q, k, v, self._bias[:, None, :], scoring).flatten(1, 2)
        mask = self._bias[:, None, None, :].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scoring.scale).flatten(1, 2)


def _first(position: int, window: int | None, block: int) -> int:
    """The first block that a token at a position sees."""
    return 0 if window is None else max(0, position - window + 1) // block


def _places(
    block: int, tables: Sequence[Sequence[int]], spans: Sequence[Span], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The block, and the place in it, of each token [T]."""
    blocks, offsets = [], []
    for table, span in zip(tables, spans, strict=True):
        positions = np.arange(span.start, span.start + span.count)
        first = span.start // block
        blocks.append(np.asarray(table[first:])[positions // block - first])
        offsets.append(positions % block)
    found_T, offsets_T = (torch.from_numpy(np.concatenate(x)).to(device) for x in (blocks, offsets))
    return found_T, offsets_T


def _row_numbers(spans: Sequence[tuple[int, Span]], device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.long), *(torch.arange(i, i + s.count) for i, s in spans)]).to(device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the kernel gives their memory when they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    bits = np.zeros(int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return torch.from_numpy(bits).view(dtype).view(shape)
