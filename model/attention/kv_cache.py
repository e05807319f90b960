"""The paged KV cache and attention to it (PagedAttention, Kwon et al. 2023).

A sequence's tokens lie in the blocks of its block table, so that sequences of any length share one pool and common
prefixes are stored once. Layers with different windows keep different parts of a sequence, so each kind of layer has a
pool and a block table of its own. In a block the keys of a head are stored as [head width, tokens] and its values as
[tokens, head width]: read in place and in order, a processor's lanes hold the tokens of a block, then a head's width.
Numbers of 16 bits stand in pairs of rows, [rows / 2, columns, 2], as instructions that add up products of pairs want.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.distributed.device import sent
from lockstep.model.attention.eager import attend_in_full
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.attention.paged_kernel import BLOCK, PagedKernel, Rows, block_shapes, first_seen, serves
from lockstep.model.attention.spec import PLAIN, Attend, AttentionSpec
from lockstep.model.config import ModelConfig, Numerics
from lockstep.model.ops.cpu import jobs, kernels

SHORT = 16
"""Spans of up to so many tokens attend token by token."""


class KVCache:
    """Paged keys and values of all layers of a model on this rank."""

    def __init__(
        self,
        model: ModelConfig,
        *,
        kv_heads: int,
        blocks: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            kv_heads: of this tensor rank.
            blocks: of each kind of layer; see `kinds`.
        """
        self.windows = kinds(model)
        shapes = self._shapes(dtype, model.head_dim)
        of_layer = [self.windows.index(model.window_of(layer)) for layer in range(model.layers)]
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for kind, count in enumerate(blocks):
            layers = [layer for layer, k in enumerate(of_layer) if k == kind]
            keys, values = (_zeros((len(layers), count, kv_heads, *shape), dtype, device) for shape in shapes)
            self.keys |= dict(zip(layers, keys, strict=True))
            self.values |= dict(zip(layers, values, strict=True))
        self.kind_of = of_layer

    def _shapes(self, dtype: torch.dtype, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the keys and of the values of one head in one block."""
        return block_shapes(dtype, width)

    def write(self, layer: int, blocks_T: Tensor, offsets_T: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> None:
        """Write the keys and values of T tokens at these blocks and offsets in them."""
        pair = self.keys[layer].shape[-1]
        self.keys[layer][blocks_T, :, :, offsets_T] = k_TGE.unflatten(-1, (-1, pair))
        self.values[layer][blocks_T, :, offsets_T // pair, :, offsets_T % pair] = v_TGE

    def gathered(self, layer: int, tables_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the keys and values [N, G, P · block, E] of N block tables of P blocks each."""
        keys, values = self.keys[layer][tables_NP], self.values[layer][tables_NP]
        keys, values = keys.permute(0, 2, 1, 4, 3, 5).flatten(4), values.permute(0, 2, 1, 3, 5, 4).flatten(3, 4)
        return keys.flatten(2, 3), values.flatten(2, 3)

    def attention(self, spans: "Sequence[Span]") -> Attend:
        """The `Attend` of a forward pass over these spans."""
        return PagedAttention(self, spans)

    def copy(self, kind: int, source: int, target: int) -> None:
        """Copy a block over another, in all layers of one kind."""
        for layer, of_layer in enumerate(self.kind_of):
            if of_layer == kind:
                self.keys[layer][target] = self.keys[layer][source]
                self.values[layer][target] = self.values[layer][source]


def kinds(model: ModelConfig) -> list[int | None]:
    """The distinct windows of a model's layers, which are its kinds of layers; None (all tokens) comes first."""
    return sorted({model.window_of(layer) for layer in range(model.layers)}, key=lambda w: w or 0)


def block_bytes(model: ModelConfig, *, kv_heads: int, dtype: torch.dtype) -> list[int]:
    """Bytes of one block, summed over the layers of each kind."""
    windows = [model.window_of(layer) for layer in range(model.layers)]
    one = 2 * kv_heads * model.head_dim * BLOCK * dtype.itemsize
    return [one * windows.count(window) for window in kinds(model)]


@dataclass(frozen=True)
class Span:
    """The tokens start … start+count−1 of a sequence, which one forward pass computes."""

    tables: Sequence[Sequence[int]]
    """The sequence's block table for each kind of layer, as far as these tokens and what they see."""
    start: int
    count: int


class PagedAttention:
    """`Attend` for spans of sequences, concatenated: writes their keys and values to the cache, then attends to it.

    A span may see tokens that another one of the same pass computes, because each layer writes before it reads. Tokens
    of short spans attend one by one, by the paged kernel where there is one; long spans by matrix products.
    """

    def __init__(
        self, cache: KVCache, spans: Sequence[Span], *, use_kernel: bool = True, numerics: Numerics = "fast"
    ) -> None:
        """
        Args:
            use_kernel: use the paged CPU kernel, which reads blocks in place, where there is one.
            numerics: exact numerics need that kernel, and all tokens attend one by one.
        """
        self._cache = cache
        held = cache.values[0]
        use_kernel = use_kernel and serves(held.dtype, held.device, held.shape[-2])
        assert use_kernel or numerics == "fast"
        longest = max(s.count for s in spans) if numerics == "exact" else SHORT if use_kernel else 1
        placed = list(zip(np.cumsum([0, *(s.count for s in spans)]).tolist(), spans, strict=False))
        short = [(i, s) for i, s in placed if s.count <= longest]
        self._long = [(i, s) for i, s in placed if s.count > longest]
        self._fresh = [(i, s) for i, s in self._long if s.start == 0]
        self._continued = [(i, s) for i, s in self._long if s.start > 0]
        self._documents = DocumentAttention([(s.count,) for _, s in self._fresh], held.device) if self._fresh else None
        self._fresh_rows = _row_numbers(self._fresh, held.device)
        by_row = partial(_ByKernel, tiled=numerics == "fast") if use_kernel else _Gathered
        self._by_row = [by_row(cache, kind, spans, short) for kind in range(len(cache.windows))]

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        """See `Attend`."""
        kind = self._cache.kind_of[layer]
        mixed = self._by_row[kind](layer, q_THE, k_TGE, v_TGE, spec)
        if self._documents:
            if len(self._fresh_rows) == len(q_THE):
                return self._documents(layer, q_THE, k_TGE, v_TGE, spec)
            rows = self._fresh_rows
            mixed[rows] = self._documents(layer, q_THE[rows], k_TGE[rows], v_TGE[rows], spec)
        for start, span in self._continued:
            here = slice(start, start + span.count)
            mixed[here] = self._attended(layer, kind, q_THE[here], span, spec)
        return mixed

    def jobs(self, heads: int) -> list[jobs.AttentionJob]:
        """The C structs for short spans: what the attention of each kind of layer has in common."""
        of_kinds = [each.jobs(heads) for each in self._by_row if isinstance(each, _ByKernel)]
        assert not self._long
        assert all(len(jobs) == 1 for jobs in of_kinds)
        return [job for (job,) in of_kinds]

    def _attended(self, layer: int, kind: int, q_LHE: Tensor, span: Span, spec: AttentionSpec) -> Tensor:
        """Attention of one span that continues a sequence, by matrix products."""
        first = first_seen(span.start, spec.window)
        stop = -(-(span.start + span.count) // BLOCK)
        k, v = self._cache.gathered(layer, torch.tensor([span.tables[kind][first:stop]], device=q_LHE.device))
        columns = torch.arange(first * BLOCK, stop * BLOCK, device=q_LHE.device)
        rows = torch.arange(span.start, span.start + span.count, device=q_LHE.device)[:, None]
        bias = _bias(columns, rows, spec.window)
        q = q_LHE.transpose(0, 1)[None]
        if spec.cap is not None:
            return attend_in_full(q, k, v, bias[None], spec)[0].transpose(0, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=spec.scale, enable_gqa=True)
        return mixed[0].transpose(0, 1)


class _ByKernel:
    """Writes keys and values and attends for the tokens of short spans, by the paged kernel."""

    def __init__(
        self, cache: KVCache, kind: int, spans: Sequence[Span], short: Sequence[tuple[int, Span]], *, tiled: bool
    ) -> None:
        self._cache = cache
        dtype, (_, groups, _, width, _) = cache.values[0].dtype, cache.values[cache.kind_of.index(kind)].shape
        rows = Rows(
            _numbers((i, s.count) for i, s in short),
            np.repeat(np.arange(len(short)), [s.count for _, s in short]),
            _numbers((s.start, s.count) for _, s in short),
            _padded([s.tables[kind][: (s.start + s.count - 1) // BLOCK + 1] for _, s in short]),
        )
        places = _places([s.tables[kind] for s in spans], spans)
        tiled = tiled and kernels.tiled(dtype, torch.device("cpu"))
        self._attend = PagedKernel(places, rows, cache.windows[kind], groups=groups, width=width, tiled=tiled)
        self.jobs = self._attend.jobs

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec) -> Tensor:
        """Mixed values [T, H, E]; undefined for tokens that are not among the rows."""
        return self._attend(self._cache.keys[layer], self._cache.values[layer], q_THE, k_TGE, v_TGE, spec)


class _Gathered:
    """Writes keys and values and attends for spans of one token; blocks are gathered and padded to the longest."""

    def __init__(self, cache: KVCache, kind: int, spans: Sequence[Span], short: Sequence[tuple[int, Span]]) -> None:
        self._cache, window = cache, cache.windows[kind]
        device = cache.values[0].device
        places = _places([s.tables[kind] for s in spans], spans)
        self._blocks, self._offsets = (sent(torch.from_numpy(x), device) for x in places)
        self._rows = _row_numbers(short, device)
        if not short:
            return
        firsts = [first_seen(s.start, window) for _, s in short]
        tables = _padded(
            [s.tables[kind][first : s.start // BLOCK + 1] for (_, s), first in zip(short, firsts, strict=True)]
        )
        self._tables = sent(torch.from_numpy(tables.astype(np.int64)), device)
        firsts_N, starts_N = (sent(torch.tensor(x), device) for x in (firsts, [s.start for _, s in short]))
        columns = firsts_N[:, None] * BLOCK + torch.arange(tables.shape[1] * BLOCK, device=device)
        self._bias = _bias(columns, starts_N[:, None], window)

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec) -> Tensor:
        """Mixed values [T, H, E]; undefined for tokens that are not among the rows."""
        self._cache.write(layer, self._blocks, self._offsets, k_TGE, v_TGE)
        mixed = q_THE.new_empty(q_THE.shape)
        if len(self._rows):
            mixed[self._rows] = self._attended(layer, q_THE[self._rows], spec)
        return mixed

    def _attended(self, layer: int, q_BHE: Tensor, spec: AttentionSpec) -> Tensor:
        """The query heads of one key-value head stand as rows of one product."""
        k, v = self._cache.gathered(layer, self._tables)
        q = q_BHE.unflatten(1, (k.shape[1], -1))
        if spec.cap is not None:
            return attend_in_full(q, k, v, self._bias[:, None, :], spec).flatten(1, 2)
        mask = self._bias[:, None, None, :].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale).flatten(1, 2)


def _bias(columns: Tensor, rows: Tensor, window: int | None) -> Tensor:
    """0 where a row's position sees a column's, −∞ elsewhere."""
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _padded(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """Tables as the rows of one array, filled up with the last block of each: another's might not be numbers."""
    found = np.zeros((len(tables), max(map(len, tables), default=0)), np.int32)
    for row, table in zip(found, tables, strict=True):
        row[: len(table)], row[len(table) :] = table, table[-1]
    return found


def _places(tables: Sequence[Sequence[int]], spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """The block, and the place in it, of each token [T]."""
    blocks, offsets = [], []
    for table, span in zip(tables, spans, strict=True):
        positions = np.arange(span.start, span.start + span.count)
        first = span.start // BLOCK
        blocks.append(np.asarray(table[first:])[positions // BLOCK - first])
        offsets.append(positions % BLOCK)
    return np.concatenate(blocks), np.concatenate(offsets)


def _row_numbers(spans: Sequence[tuple[int, Span]], device: torch.device) -> Tensor:
    return sent(torch.from_numpy(_numbers((i, s.count) for i, s in spans)), device)


def _numbers(ranges: Iterable[tuple[int, int]]) -> np.ndarray:
    """Of ranges, given by their first number and how many there are, head to tail."""
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(start, start + count) for start, count in ranges)])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the kernel gives their memory when they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    bits = np.zeros(int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return torch.from_numpy(bits).view(dtype).view(shape)
