"""The interface of attention in a block, and what changes its scores: scale, soft cap, sliding window."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """How a layer computes attention scores, and how far back its tokens see."""

    scale: float | None = None
    """What q·k is multiplied by; None for 1/√E."""
    cap: float | None = None
    """Scores s become cap · tanh(s / cap)."""
    window: int | None = None
    """Tokens that a token sees, itself included: position p sees p − window + 1 … p of its document. None for all."""


PLAIN = AttentionSpec()


def soft_capped(scores: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(scores / cap) (Gemma 2's report, section 2); the scores themselves without a cap."""
    return scores if cap is None else scores.div(cap).tanh().mul(cap)


class Attend(Protocol):
    """The attention that a block calls: within packed documents, over context ranks, or over a KV cache."""

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        """Attention [T, H, E] for T tokens, H query heads, G key-value heads and head width E."""
        ...


def call_attend(attend: Attend, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec) -> Tensor:
    """Call attend(layer, q, k, v, spec). Blocks call attention through it, so that it can be left uncompiled."""
    return attend(layer, q_THE, k_TGE, v_TGE, spec)
