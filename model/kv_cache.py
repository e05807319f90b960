"""Keys and values of running sequences in blocks of a few tokens, and attention to them.

A sequence's tokens lie in the blocks of its table, wherever these are, so that sequences of any length share one pool
and equal beginnings are kept once. Layers with different windows keep different parts of a text, so each kind of layer
has a pool and a table of its own. In a block the keys of a head stand as [head width, tokens] and its values as
[tokens, head width]: read in place and in order, a processor's lanes hold the tokens of a block, then a head's width.
Numbers of 16 bits stand in pairs of rows, [rows / 2, columns, 2], as instructions that add up products of pairs want.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.model import kernels
from lockstep.model.attention import Attend, DocumentAttention
from lockstep.model.config import ModelConfig
from lockstep.model.full_attention import PLAIN, Scoring, attend_in_full

SHORT = 16
"""Spans of up to so many tokens attend token by token."""

PART = 512
"""Tokens of a sequence that one thread attends to at a time; as in `kernels.c`, whose blocks have 16 tokens."""


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
        self.pair = 2 if dtype.itemsize == 2 and not model.head_dim % 2 else 1
        of_layer = [self.windows.index(model.window_of(layer)) for layer in range(model.layers)]
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for kind, count in enumerate(blocks):
            layers = [layer for layer, k in enumerate(of_layer) if k == kind]
            keys, values = (
                _zeros((len(layers), count, kv_heads, *shape), dtype, device) for shape in self._shapes(model.head_dim)
            )
            self.keys |= dict(zip(layers, keys, strict=True))
            self.values |= dict(zip(layers, values, strict=True))
        self.kind_of = of_layer

    def _shapes(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the keys and of the values of a head in a block."""
        return (width // self.pair, self.block, self.pair), (self.block // self.pair, width, self.pair)

    def write(self, layer: int, blocks_T: Tensor, offsets_T: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> None:
        """Keep keys and values of tokens at places of blocks."""
        pair = self.pair
        self.keys[layer][blocks_T, :, :, offsets_T] = k_TGE.unflatten(-1, (-1, pair))
        self.values[layer][blocks_T, :, offsets_T // pair, :, offsets_T % pair] = v_TGE

    def gathered(self, layer: int, tables_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, G, P · block, E] of tables of P blocks each."""
        keys, values = self.keys[layer][tables_NP], self.values[layer][tables_NP]
        keys, values = keys.permute(0, 2, 1, 4, 3, 5).flatten(4), values.permute(0, 2, 1, 3, 5, 4).flatten(3, 4)
        return keys.flatten(2, 3), values.flatten(2, 3)

    def attention(self, spans: "Sequence[Span]") -> Attend:
        """Attention of a pass to the tokens of sequences that lie here."""
        return PagedAttention(self, spans)

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


@dataclass(frozen=True)
class _Row:
    """A token that attends alone."""

    token: int
    """Its place in the pass."""
    tables: Sequence[Sequence[int]]
    position: int


class PagedAttention:
    """`Attend` for spans of sequences, head to tail: keys and values are kept first, then each token sees its own.

    A span may see what another one of the same pass computes, because each layer keeps everything before it looks.
    Tokens of short spans attend one by one, in place where there is a kernel; long spans attend by products.
    """

    def __init__(self, cache: KVCache, spans: Sequence[Span], *, in_place: bool = True) -> None:
        """
        Args:
            in_place: use the kernel that reads blocks in place, where there is one.
        """
        self._cache = cache
        held = cache.values[0]
        in_place = in_place and kernels.usable(held.dtype, held.device) and not held.shape[-2] % 2
        shortest = SHORT if in_place else 1
        placed = list(zip(np.cumsum([0, *(s.count for s in spans)]).tolist(), spans, strict=False))
        rows = [_Row(i + n, s.tables, s.start + n) for i, s in placed if s.count <= shortest for n in range(s.count)]
        self._long = [(i, s) for i, s in placed if s.count > shortest]
        self._fresh = [(i, s) for i, s in self._long if s.start == 0]
        self._continued = [(i, s) for i, s in self._long if s.start > 0]
        self._documents = DocumentAttention([(s.count,) for _, s in self._fresh], held.device) if self._fresh else None
        self._fresh_rows = _row_numbers(self._fresh, held.device)
        by_row = _InPlace if in_place else _Gathered
        self._by_row = [by_row(cache, kind, spans, rows) for kind in range(len(cache.windows))]

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        """See `Attend`."""
        kind = self._cache.kind_of[layer]
        mixed = self._by_row[kind](layer, q_THE, k_TGE, v_TGE, scoring)
        if self._documents:
            if len(self._fresh_rows) == len(q_THE):
                return self._documents(layer, q_THE, k_TGE, v_TGE, scoring)
            rows = self._fresh_rows
            mixed[rows] = self._documents(layer, q_THE[rows], k_TGE[rows], v_TGE[rows], scoring)
        for start, span in self._continued:
            here = slice(start, start + span.count)
            mixed[here] = self._attended(layer, kind, q_THE[here], span, scoring)
        return mixed

    def jobs(self, heads: int) -> list[kernels.AttentionJob]:
        """Of single tokens, attended to in place: what the attention of each kind of layer has in common."""
        return [each.job(heads) for each in self._by_row if isinstance(each, _InPlace)]

    def _attended(self, layer: int, kind: int, q_LHE: Tensor, span: Span, scoring: Scoring) -> Tensor:
        """One span of tokens that also see what is before them."""
        first = _first(span.start, scoring.window, self._cache.block)
        stop = -(-(span.start + span.count) // self._cache.block)
        k, v = self._cache.gathered(layer, torch.tensor([span.tables[kind][first:stop]], device=q_LHE.device))
        columns = torch.arange(first * self._cache.block, stop * self._cache.block, device=q_LHE.device)
        rows = torch.arange(span.start, span.start + span.count, device=q_LHE.device)[:, None]
        bias = _bias(columns, rows, scoring.window)
        q = q_LHE.transpose(0, 1)[None]
        if scoring.cap is not None:
            return attend_in_full(q, k, v, bias[None], scoring)[0].transpose(0, 1)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.to(q.dtype), scale=scoring.scale, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)


class _InPlace:
    """Keeps keys and values and attends for single tokens, by a kernel that reads blocks where they lie.

    A sequence is attended to in parts of a fixed length, which are then put together in order: what comes out for a
    token does not depend on the batch.
    """

    def __init__(self, cache: KVCache, kind: int, spans: Sequence[Span], rows: Sequence[_Row]) -> None:
        self._cache = cache
        window = cache.windows[kind]
        _, groups, _, width, _ = cache.values[cache.kind_of.index(kind)].shape
        self._dtype = cache.values[0].dtype
        places, offsets = _places(cache.block, [s.tables[kind] for s in spans], spans)
        lasts = np.array([r.position for r in rows], np.int32)
        firsts = np.zeros_like(lasts) if window is None else np.maximum(lasts - (window - 1), 0)
        counts = lasts // PART - firsts // PART + 1
        of_part = np.repeat(np.arange(len(rows)), counts)
        starts = np.cumsum(counts) - counts
        part_starts = (firsts[of_part] // PART + np.arange(len(of_part)) - starts[of_part]) * PART
        arrays: dict[str, Any] = {
            "blocks": places,
            "offsets": offsets,
            "tokens": [r.token for r in rows],
            "tables": _padded([r.tables[kind][: r.position // cache.block + 1] for r in rows]),
            "firsts": firsts,
            "lasts": lasts,
            "part_rows": of_part,
            "part_starts": part_starts,
            "row_parts": np.append(starts, len(of_part)),
        }
        self._arrays = {name: np.ascontiguousarray(array, np.int32) for name, array in arrays.items()}
        self._job = kernels.AttentionJob(
            writes=len(places),
            rows=len(rows),
            parts=len(of_part),
            groups=groups,
            width=width,
            table_width=self._arrays["tables"].shape[-1],
            tiled=kernels.tiled(self._dtype, torch.device("cpu")),
            **{name: array.ctypes.data for name, array in self._arrays.items()},
        )
        self._size = int((lasts - firsts + 1).sum()) * groups * width
        self._partial: np.ndarray | None = None

    def job(self, heads: int) -> kernels.AttentionJob:
        """What the attention of all layers has in common."""
        if self._partial is None:
            self._partial = np.empty((self._job.parts, heads, self._job.width + 2), np.float32)
            self._job.partial, self._job.heads = self._partial.ctypes.data, heads
        return self._job

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scoring: Scoring) -> Tensor:
        """Mixed values [T, H, E]; undefined for tokens that are not among the rows."""
        q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q_THE, k_TGE, v_TGE))
        mixed, job = q.new_empty(q.shape), self.job(q.shape[1])
        job.written = job.kept = job.taken = job.done = job.joined = 0
        job.q, job.k, job.v, job.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), mixed.data_ptr()
        job.q_stride, job.k_stride, job.v_stride = q.stride(0), k.stride(0), v.stride(0)
        job.keys, job.values = self._cache.keys[layer].data_ptr(), self._cache.values[layer].data_ptr()
        job.scale = q.shape[2] ** -0.5 if scoring.scale is None else scoring.scale
        job.cap = scoring.cap or 0.0
        kernels.run("attention", job, self._dtype, size=self._size)
        return mixed


class _Gathered:
    """Keeps keys and values and attends for single tokens, whose sequences are gathered and padded to the longest."""

    def __init__(self, cache: KVCache, kind: int, spans: Sequence[Span], rows: Sequence[_Row]) -> None:
        self._cache, window = cache, cache.windows[kind]
        device = cache.values[0].device
        places = _places(cache.block, [s.tables[kind] for s in spans], spans)
        self._blocks, self._offsets = (torch.from_numpy(x).to(device) for x in places)
        self._rows = torch.tensor([r.token for r in rows], dtype=torch.long, device=device)
        if not rows:
            return
        firsts = [_first(r.position, window, cache.block) for r in rows]
        tables = _padded(
            [r.tables[kind][first : r.position // cache.block + 1] for r, first in zip(rows, firsts, strict=True)]
        )
        self._tables = torch.from_numpy(tables.astype(np.int64)).to(device)
        columns = torch.tensor(firsts)[:, None] * cache.block + torch.arange(tables.shape[1] * cache.block)
        self._bias = _bias(columns, torch.tensor([r.position for r in rows])[:, None], window).to(device)

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scoring: Scoring) -> Tensor:
        """Mixed values [T, H, E]; undefined for tokens that are not among the rows."""
        self._cache.write(layer, self._blocks, self._offsets, k_TGE, v_TGE)
        mixed = q_THE.new_empty(q_THE.shape)
        if len(self._rows):
            mixed[self._rows] = self._attended(layer, q_THE[self._rows], scoring)
        return mixed

    def _attended(self, layer: int, q_BHE: Tensor, scoring: Scoring) -> Tensor:
        """The query heads of one key-value head stand as rows of one product."""
        k, v = self._cache.gathered(layer, self._tables)
        q = q_BHE.unflatten(1, (k.shape[1], -1))
        if scoring.cap is not None:
            return attend_in_full(q, k, v, self._bias[:, None, :], scoring).flatten(1, 2)
        mask = self._bias[:, None, None, :].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scoring.scale).flatten(1, 2)


def _first(position: int, window: int | None, block: int) -> int:
    """The first block that a token at a position sees."""
    return 0 if window is None else max(0, position - window + 1) // block


def _bias(columns: Tensor, rows: Tensor, window: int | None) -> Tensor:
    """0 where a row's position sees a column's, −∞ elsewhere."""
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _padded(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """Tables as the rows of one array; places of padding name a block that exists."""
    found = np.zeros((len(tables), max(map(len, tables), default=0)), np.int32)
    for row, table in zip(found, tables, strict=True):
        row[: len(table)] = table
    return found


def _places(block: int, tables: Sequence[Sequence[int]], spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """The block, and the place in it, of each token [T]."""
    blocks, offsets = [], []
    for table, span in zip(tables, spans, strict=True):
        positions = np.arange(span.start, span.start + span.count)
        first = span.start // block
        blocks.append(np.asarray(table[first:])[positions // block - first])
        offsets.append(positions % block)
    return np.concatenate(blocks), np.concatenate(offsets)


def _row_numbers(spans: Sequence[tuple[int, Span]], device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.long), *(torch.arange(i, i + s.count) for i, s in spans)]).to(device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the kernel gives their memory when they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    bits = np.zeros(int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return torch.from_numpy(bits).view(dtype).view(shape)
