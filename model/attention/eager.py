"""Eager attention: plain matrix products with materialised scores, faster than torch's CPU kernel on short documents.

Scores and softmax are in fp32. In bf16 the products are of bf16 numbers, as in FlashAttention (Dao 2023), and summed in
fp32; probabilities are kept for the backward pass in the dtype of the model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lockstep.model.attention.spec import PLAIN, AttentionSpec, soft_capped
from lockstep.model.ops.upcast import multiply

Span = tuple[slice, slice]
"""A range of rows (queries), and the range of columns (keys) that any of them sees."""


def attend_in_full(
    q_NHLE: Tensor,
    k_NGSE: Tensor,
    v_NGSE: Tensor,
    bias_NLS: Tensor,
    spec: AttentionSpec = PLAIN,
    spans: Sequence[Span] | None = None,
) -> Tensor:
    """softmax(cap(q·kᵀ·scale) + bias)·v, [N, H, L, E], with a hand-written gradient.

    The query heads of one key-value head are rows of one product.

    Args:
        bias_NLS: in fp32, −∞ where a row sees no column.
        spans: all rows in order, in parts, each with its columns, so that columns hidden from a part are not computed.
    """
    whole = slice(0, q_NHLE.shape[2]), slice(0, k_NGSE.shape[2])
    return _Attention.apply(q_NHLE, k_NGSE, v_NGSE, bias_NLS, spec, spans or [whole])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_NHLE: Tensor,
        k_NGSE: Tensor,
        v_NGSE: Tensor,
        bias_NLS: Tensor,
        spec: AttentionSpec,
        spans: Sequence[Span],
    ) -> Tensor:
        q, k, v = _grouped(q_NHLE, k_NGSE.shape[1]), k_NGSE.flatten(0, 1), v_NGSE.flatten(0, 1)
        weights = _Assembled((*q.shape[:3], k.shape[1]), q.dtype)
        for span in spans:
            scores = _products(q, k, span).view(*q_NHLE.shape[:2], *_extent(span))
            bias = bias_NLS[:, None, span[0], span[1]]
            if spec.cap is None:
                scores = torch.add(bias, scores, alpha=_scale(spec, q))
            else:
                scores = soft_capped(scores.mul_(_scale(spec, q)), spec.cap) + bias
            weights.put(span, scores.softmax(-1))
        ctx.save_for_backward(q, k, v, weights.whole)
        ctx.settings = spec, spans
        return multiply(torch.bmm, weights.whole.flatten(1, 2), v).view(q_NHLE.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        spec, spans = ctx.settings
        d_mixed = gradients[0].reshape(q.shape)
        d_scores = _Assembled(weights.shape, q.dtype)
        for span in spans:
            part = weights[:, :, span[0], span[1]].float()
            d_part = torch._softmax_backward_data(_products(d_mixed, v, span), part, -1, torch.float32)
            if spec.cap is not None:  # tanh' = 1 − tanh²
                capped = _products(q, k, span).mul_(_scale(spec, q) / spec.cap).tanh_()
                d_part.mul_(1 - capped.square_())
            d_scores.put(span, d_part.mul_(_scale(spec, q)))
        rows = d_scores.whole.flatten(1, 2)
        d_q = multiply(torch.bmm, rows, k).view(gradients[0].shape)
        d_k = multiply(torch.bmm, rows.transpose(1, 2), q.flatten(1, 2))
        d_v = multiply(torch.bmm, weights.flatten(1, 2).transpose(1, 2), d_mixed.flatten(1, 2))
        kv_heads = len(k) // len(d_q)
        return d_q, d_k.unflatten(0, (-1, kv_heads)), d_v.unflatten(0, (-1, kv_heads)), None, None, None


class _Assembled:
    """A tensor [N · G, R, L, S] that is filled span by span; zero outside of the spans."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._shape, self._dtype = torch.Size(shape), dtype
        self.whole: Tensor

    def put(self, span: Span, part: Tensor) -> None:
        """Write the values of the next span."""
        rows, columns = span
        part = part.view(*self._shape[:2], *_extent(span))
        if part.shape == self._shape:
            self.whole = part.to(self._dtype)
            return
        if rows.start == 0:
            self.whole = torch.empty(self._shape, dtype=self._dtype, device=part.device)
        line = self.whole[:, :, rows]
        line[..., : columns.start] = 0
        line[..., columns] = part
        line[..., columns.stop :] = 0


def _grouped(x_NHLE: Tensor, kv_heads: int) -> Tensor:
    """[N · G, R, L, E]: the R query heads of each key-value head together."""
    n, heads, length, width = x_NHLE.shape
    return x_NHLE.reshape(n * kv_heads, heads // kv_heads, length, width)


def _extent(span: Span) -> tuple[int, int]:
    return span[0].stop - span[0].start, span[1].stop - span[1].start


def _scale(spec: AttentionSpec, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if spec.scale is None else spec.scale


def _products(x: Tensor, y: Tensor, span: Span) -> Tensor:
    """x · yᵀ of a span's rows and columns, [N · G, R, rows, columns] in fp32; exact products of bf16 numbers."""
    rows, columns = x[:, :, span[0]], y[:, span[1]]
    with _products_in(x.dtype):
        found = torch.bmm(rows.float().flatten(1, 2), columns.float().transpose(1, 2))
    return found.unflatten(1, rows.shape[1:3])


@contextmanager
def _products_in(dtype: torch.dtype) -> Iterator[None]:
    """Lets oneDNN multiply fp32 tensors that hold numbers of a narrower dtype in that dtype."""
    backends: Any = torch.backends
    matmul = backends.mkldnn.matmul
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
