"""What becomes of scores, of attention or of a vocabulary, before the softmax."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """How a layer scores what its tokens see."""

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
    """How a block's tokens see each other."""

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        """Mixed values [T, H, E] for T tokens, H query heads, G key-value heads and head width E."""
        ...


def call_attend(attend: Attend, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec) -> Tensor:
    """attend(layer, q, k, v, spec): the one place where a block calls attention, so that it can be wrapped."""
    return attend(layer, q_THE, k_TGE, v_TGE, spec)
