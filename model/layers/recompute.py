"""Activation checkpointing."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lockstep.model.attention.spec import PLAIN, Attend, AttentionSpec

Recompute = Literal["none", "selective", "full"]
"""Activations that the backward pass computes again: none, those of attention, or all inside of a block."""


class Recomputed:
    """An `Attend` that keeps queries, keys and values only and is computed again in the backward pass."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        """See `Attend`."""
        return recomputed(self._attend, layer, q_THE, k_TGE, v_TGE, spec)


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), whose activations are computed again in the backward pass (Chen et al. 2016)."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
