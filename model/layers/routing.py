"""Routing replay for mixtures of experts: records the experts that tokens go to, and has tokens go to recorded ones.

Training that takes the experts of the rollout (R3, rollout routing replay; Ma et al. 2025, arXiv 2510.11370) computes
with the weights that drew a token, however close two experts were to each other. The choice alone is replayed: the
probabilities are those of the router in training, at the recorded experts, so that its gradient is as usual.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Route = Callable[[int, Tensor], Tensor]
"""(layer, experts [T, K] that its router chooses, best first) → the experts [T, K] that the tokens go to."""

UNRECORDED = -1
"""In the place of each expert of a token that has no record."""


def expert_dtype(experts: int) -> torch.dtype:
    """The smallest dtype that counts so many experts: a byte for each up to 256 of them."""
    return torch.uint8 if experts <= 256 else torch.int16


class Recorder:
    """A `Route` that leaves the choice to the routers, and keeps it."""

    def __init__(self) -> None:
        self._chosen: dict[int, Tensor] = {}

    def __call__(self, layer: int, chosen_TK: Tensor) -> Tensor:
        """See `Route`."""
        self._chosen[layer] = chosen_TK
        return chosen_TK

    def experts(self, dtype: torch.dtype) -> Tensor:
        """The experts of each token in each layer of the pass, [T, L, K], best first."""
        return torch.stack([self._chosen[layer] for layer in sorted(self._chosen)], 1).to(dtype)


class Replay:
    """A `Route` that takes recorded experts; tokens without a record go where their router sends them."""

    def __init__(self, experts_TLK: Tensor, layers: Sequence[int], counts: Tensor | None = None) -> None:
        """
        Args:
            experts_TLK: of the tokens that this rank computes (with sequence parallelism those of all its tensor
                ranks), in these layers; `UNRECORDED` for tokens without a record.
            counts: [2], in int64: the pairs of a token and a layer whose recorded set of experts is not the one that
                the router chooses, and all pairs that have a record, are added to it. What is recomputed in the
                backward pass counts twice in both.
        """
        self._experts_TLK, self._place, self._counts = experts_TLK, {layer: i for i, layer in enumerate(layers)}, counts

    def __call__(self, layer: int, chosen_TK: Tensor) -> Tensor:
        """See `Route`."""
        recorded_TK = self._experts_TLK[:, self._place[layer]].to(chosen_TK.dtype)
        known_T = recorded_TK[:, 0] != UNRECORDED
        routed_TK = torch.where(known_T[:, None], recorded_TK, chosen_TK)
        if self._counts is not None:
            differs_T = (routed_TK.sort(-1).values != chosen_TK.sort(-1).values).any(-1)
            self._counts += torch.stack([differs_T.sum(), known_T.sum()])
        return routed_TK
