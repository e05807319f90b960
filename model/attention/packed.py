"""Causal attention over packed documents, in which the samples of a group share their prompt.

A block passes its queries, keys and values to an `Attend`; training passes `DocumentAttention`, rollouts a KV cache, so
that one block serves both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.distributed.device import sent
from lockstep.model.attention.eager import Span, attend_in_full
from lockstep.model.attention.exact import attend_exactly, with_gradient
from lockstep.model.attention.spec import PLAIN, AttentionSpec
from lockstep.model.config import Numerics

LONGEST_IN_FULL = 1024
"""Documents up to this length are attended to by plain products, longer ones by torch's flash kernel, in tokens."""

ROWS_AT_ONCE = 128
"""Queries of a document whose scores are computed together, up to the last key that any of them sees."""


class DocumentAttention:
    """`Attend` for a packed row: causal attention within each document, none across documents.

    A document is a prompt and branches that continue it: a branch sees the prompt and itself, so the samples of a
    group share the work on their prompt. Prompts and branches are segments; segments of similar size are gathered
    into one padded batch of queries, each with the keys of its prompt before its own.
    """

    def __init__(self, documents: Sequence[Sequence[int]], device: torch.device, numerics: Numerics = "fast") -> None:
        """
        Args:
            documents: for each the tokens of its prompt and of each of its branches; all add up to T.
        """
        self._exact = numerics == "exact"
        by_size: dict[tuple[int, int], list[_Segment]] = {}
        for segment in _segments(documents):
            by_size.setdefault((_bucket(segment.length), _bucket(segment.seen)), []).append(segment)
        self._batches = [_SegmentBatch(members, device) for members in by_size.values()]
        segments = [s for b in self._batches for s in b.segments]
        rows = _offsets([b.queries for b in self._batches for _ in b.segments])
        keys = _offsets([b.keys for b in self._batches for _ in b.segments])
        own_rows = _joined([o + torch.arange(s.length) for s, o in zip(segments, rows, strict=True)])
        own_keys = _joined([o + s.seen + torch.arange(s.length) for s, o in zip(segments, keys, strict=True)])
        order = _joined([s.start + torch.arange(s.length) for s in segments]).argsort()
        lent = [(o, s) for s, o in zip(segments, keys, strict=True) if s.seen]
        shared = (
            _joined([o + torch.arange(s.seen) for o, s in lent]),
            _joined([s.prompt + torch.arange(s.seen) for _, s in lent]),
        )
        nothing = _joined([]), _joined([])
        self._rows = _Gather(_joined([b.row_tokens for b in self._batches]), own_rows[order], nothing, device)
        self._keys = _Gather(_joined([b.key_tokens for b in self._batches]), own_keys[order], shared, device)

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        """See `Attend`."""
        rows = [len(b.row_tokens) for b in self._batches]
        keys = [len(b.key_tokens) for b in self._batches]
        parts = zip(
            self._batches,
            self._rows.spread(q_THE).split(rows),
            *(self._keys.spread(x).split(keys) for x in (k_TGE, v_TGE)),
            strict=True,
        )
        padded = [(batch.attend_exactly if self._exact else batch.attend)(q, k, v, spec) for batch, q, k, v in parts]
        return self._rows.collected(padded[0] if len(padded) == 1 else torch.cat(padded)).view_as(q_THE)


class _Gather:
    """Maps tokens of a row to slots of padded batches, and back; each token owns one slot and may fill others."""

    def __init__(self, tokens_P: Tensor, own_T: Tensor, lent: tuple[Tensor, Tensor], device: torch.device) -> None:
        """
        Args:
            tokens_P: the token in each slot; slots of padding get no gradient.
            own_T: each token's own slot.
            lent: further slots, and the token in each.
        """
        self.tokens_P, self.own_T = sent(tokens_P, device), sent(own_T, device)
        self.lent = tuple(sent(x, device) for x in lent)

    def spread(self, x: Tensor) -> Tensor:
        """[T, …] → [P, …]."""
        return _Spread.apply(x, self)

    def collected(self, x: Tensor) -> Tensor:
        """[P, …] → [T, …], from each token's own slot."""
        return _Collected.apply(x, self)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: _Gather) -> Tensor:
        ctx.gather = gather
        return x.index_select(0, gather.tokens_P)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].index_select(0, ctx.gather.own_T)
        places, tokens = ctx.gather.lent
        if len(places):
            gradient.index_add_(0, tokens, gradients[0].index_select(0, places))
        return gradient, None


class _Collected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: _Gather) -> Tensor:
        ctx.gather = gather
        return x.index_select(0, gather.own_T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        places = len(ctx.gather.tokens_P)
        return gradients[0].new_zeros(places, *gradients[0].shape[1:]).index_copy_(
            0, ctx.gather.own_T, gradients[0]
        ), None


def _offsets(widths: Sequence[int]) -> list[int]:
    return [0, *accumulate(widths)][:-1]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.long), *parts])


@dataclass(frozen=True)
class _Segment:
    """Tokens start … start+length of a row, which also see the `seen` tokens from `prompt` on."""

    start: int
    length: int
    prompt: int
    seen: int


def _segments(documents: Sequence[Sequence[int]]) -> list[_Segment]:
    found, start = [], 0
    for prompt, *branches in documents:
        if len(branches) == 1:  # one branch: the document is simply causal
            prompt, branches = prompt + branches[0], []
        document, start = start, start + prompt
        found.append(_Segment(document, prompt, document, 0))
        for branch in branches:
            if branch:
                found.append(_Segment(start, branch, document, prompt))
            start += branch
    return found


def _bucket(length: int) -> int:
    """Lengths within an eighth of a power of two share a bucket."""
    step = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


class _SegmentBatch:
    """Segments of similar size as one batch of attention.

    A row of keys holds the seen tokens and the segment's own, so that its column is a key's position in the document.
    """

    def __init__(self, segments: list[_Segment], device: torch.device) -> None:
        self.segments = segments
        self.queries = max(s.length for s in segments)
        self.keys = max(s.seen + s.length for s in segments)
        start, length, prompt, seen = (
            torch.tensor([getattr(s, name) for s in segments])[:, None]
            for name in ("start", "length", "prompt", "seen")
        )
        rows, columns = torch.arange(self.queries)[None], torch.arange(self.keys)[None]
        own = start + (columns - seen).clamp(max=length - 1)
        self.row_tokens = (start + rows.clamp(max=length - 1)).flatten()
        self.key_tokens = torch.where(columns < seen, prompt + columns, own).flatten()
        self._least, self._most = int(seen.min()), int(seen.max())
        self._least_last = int((seen + length).min()) - 1
        self._first_N, self._last_N = (sent(t[:, 0], device) for t in (seen, seen + length - 1))
        self._biases: dict[tuple[int | None, torch.dtype], Tensor] = {}
        self._causal = not any(s.seen for s in segments)

    def attend(self, q_PHE: Tensor, k_PGE: Tensor, v_PGE: Tensor, spec: AttentionSpec) -> Tensor:
        """Attention of padded queries and keys, [N · queries, H · E], padding included."""
        q, k, v = (t.unflatten(0, (len(self.segments), -1)).transpose(1, 2) for t in (q_PHE, k_PGE, v_PGE))
        window = None if spec.window is None or spec.window >= self.keys else spec.window
        if spec.cap is None and (self.queries > LONGEST_IN_FULL or q.is_cuda):
            causal = self._causal and window is None
            mask = None if causal else self._bias(window, q.dtype)[:, None]
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=spec.scale, enable_gqa=True
            )
        else:
            mixed = attend_in_full(q, k, v, self._bias(window, torch.float32), spec, self._spans(window))
        return mixed.transpose(1, 2).flatten(0, 1).flatten(1)

    def attend_exactly(self, q_PHE: Tensor, k_PGE: Tensor, v_PGE: Tensor, spec: AttentionSpec) -> Tensor:
        """The same, batch-invariant; the gradient is that of `attend`."""

        def value(*tensors: Tensor) -> Tensor:
            q, k, v = (t.unflatten(0, (len(self.segments), -1)) for t in tensors)
            return attend_exactly(q, k.transpose(1, 2), v.transpose(1, 2), self._first_N, spec).flatten(0, 1).flatten(1)

        return with_gradient(value, partial(self.attend, spec=spec), (q_PHE, k_PGE, v_PGE))

    def _spans(self, window: int | None) -> list[Span]:
        """Blocks of rows, and the columns that any of their tokens sees."""
        starts = range(0, self.queries, ROWS_AT_ONCE)
        rows = [slice(start, min(start + ROWS_AT_ONCE, self.queries)) for start in starts]
        first = [
            0 if window is None else max(0, min(self._least + r.start, self._least_last) - window + 1) for r in rows
        ]
        return [(r, slice(f, min(self.keys, self._most + r.stop))) for r, f in zip(rows, first, strict=True)]

    def _bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where the token of a row [N, L] sees the column's key [S], −∞ elsewhere; made on the device, once."""
        if (window, dtype) not in self._biases:
            hidden = self._hidden(window)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._biases[window, dtype] = bias.masked_fill_(hidden, float("-inf"))
        return self._biases[window, dtype]

    def _hidden(self, window: int | None) -> Tensor:
        """Whether the token of a row [N, L] does not see the column's key [S]."""
        device = self._first_N.device
        columns = torch.arange(self.keys, device=device)
        position_NL = self._first_N[:, None] + torch.arange(self.queries, device=device)
        hidden = columns > position_NL[:, :, None]
        if window is not None:  # a row of padding sees what the last token does: a row of −∞ would give NaN
            hidden |= columns <= position_NL.minimum(self._last_N[:, None])[:, :, None] - window
        return hidden
