"""Keys and values of running sequences, and attention to them.

Sequences occupy slots 0 … n−1 without holes: one that ends hands its slot to the last, so that a decoding step reads
one contiguous block of the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.model.attention import DocumentAttention
from lockstep.model.full_attention import PLAIN, Scoring, attend_in_full


class KVCache:
    """Room for `slots` sequences of up to `length` tokens each."""

    def __init__(
        self, *, layers: int, slots: int, length: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (layers, slots, kv_heads, length, head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        self.slots, self.length = slots, length

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of one slot over another."""
        for cache in (self.keys, self.values):
            cache[:, target, :, :tokens] = cache[:, source, :, :tokens]


class Prefill:
    """`Attend` for whole prompts, head to tail; each prompt's keys and values go to all slots that continue it."""

    def __init__(self, cache: KVCache, lengths: tuple[int, ...], slots: list[list[int]]) -> None:
        self._cache, self._lengths = cache, lengths
        self._slots = [torch.tensor(s) for s in slots]
        self._documents = DocumentAttention([(n,) for n in lengths], cache.keys.device)

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        """See `Attend`."""
        start = 0
        for length, slots in zip(self._lengths, self._slots, strict=True):
            self._cache.keys[layer, slots, :, :length] = k_TGE[start : start + length].transpose(0, 1)
            self._cache.values[layer, slots, :, :length] = v_TGE[start : start + length].transpose(0, 1)
            start += length
        return self._documents(layer, q_THE, k_TGE, v_TGE, scoring)


class Decode:
    """`Attend` for the next token of the sequences in slots 0 … B−1."""

    def __init__(self, cache: KVCache, lengths_B: Tensor) -> None:
        """
        Args:
            lengths_B: tokens already in each slot, which is also the position of the next.
        """
        self._cache, self._lengths = cache, lengths_B
        self._rows = torch.arange(len(lengths_B))
        self._longest = int(lengths_B.max()) + 1
        self._masks: dict[int | None, tuple[int, Tensor]] = {}

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scoring: Scoring = PLAIN) -> Tensor:
        """See `Attend`. The query heads of one key-value head stand as rows of one product."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._rows, :, self._lengths] = k_TGE
        values[self._rows, :, self._lengths] = v_TGE
        batch, heads, width = q_THE.shape
        first, bias = self._mask(scoring.window)
        q = q_THE.view(batch, k_TGE.shape[1], -1, width)
        k, v = keys[:batch, :, first : self._longest], values[:batch, :, first : self._longest]
        if scoring.cap is None:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None, :], scale=scoring.scale)
        else:
            mixed = attend_in_full(q, k, v, bias[:, None, :], scoring)
        return mixed.reshape(batch, heads, width)

    def _mask(self, window: int | None) -> tuple[int, Tensor]:
        """The first position that any sequence sees, and 0 or −∞ [B, S] for the positions from there on."""
        if window is not None and window >= self._longest:
            window = None
        if window not in self._masks:
            first = 0 if window is None else max(0, int(self._lengths.min()) + 1 - window)
            positions, last = torch.arange(first, self._longest)[None], self._lengths[:, None]
            hidden = positions > last
            if window is not None:
                hidden |= positions <= last - window
            bias = torch.zeros(hidden.shape, dtype=self._cache.keys.dtype).masked_fill_(hidden, float("-inf"))
            self._masks[window] = first, bias
        return self._masks[window]
