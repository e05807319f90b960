"""Activation checkpointing: what a block keeps for the backward pass, and what it recomputes."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lockstep.model.attention.spec import PLAIN, Attend, AttentionSpec

Recompute = Literal["none", "selective", "full"]
"""Activations that the backward pass recomputes: none, those of attention, or all inside of a block."""


class Recomputed:
    """An `Attend` under activation checkpointing: it keeps queries, keys and values, and recomputes the rest."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        """See `Attend`."""
        return recomputed(self._attend, layer, q_THE, k_TGE, v_TGE, spec)


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args) under activation checkpointing: activations are recomputed in the backward (Chen et al. 2016)."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
