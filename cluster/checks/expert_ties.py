"""Records routers' choices of experts, and tells a tie, which rounding decides, from an error."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lockstep.model.layers.moe import Choice, MoE, Sequences
from lockstep.model.transformer import Transformer

TIE = 1e-6
"""Probabilities of two experts that are closer than this tie: sums of fp32 in another order exchange them."""


@dataclass(frozen=True)
class Choices:
    """How many of some tokens one layer's router sent to each expert, and the smallest margin of its choices."""

    tokens_E: NDArray[np.int64]
    """[E] how many tokens went to each expert."""
    margin: float
    """The smallest difference in probability, of any token, between its last expert and the next that it left out."""


Routing = Mapping[int, Choices]
"""By layer."""


class RoutingWatch:
    """Records every choice of a transformer's routers, except for padding and documents of weight 0."""

    def __init__(self, transformer: Transformer) -> None:
        self._found: defaultdict[int, list[Choices]] = defaultdict(list)
        for index, block in transformer.blocks.items():
            if isinstance(block.mlp, MoE):
                block.mlp.register_forward_pre_hook(partial(self._watch, int(index)))

    def taken(self) -> Routing:
        """The choices recorded since the last call. What is recomputed in the backward pass was recorded twice."""
        found = {layer: _joined(choices) for layer, choices in self._found.items()}
        self._found.clear()
        return found

    def _watch(self, layer: int, moe: MoE, arguments: tuple[Tensor, Sequences, Choice | None]) -> None:
        x_T1D, sequences, _ = arguments
        chosen_TK, margin_T = moe.choices(x_T1D)
        counts_T = sequences.weight_D[sequences.document_T] != 0
        tokens_E = chosen_TK[counts_T].flatten().bincount(minlength=moe.moe.experts).numpy(force=True)
        margin = margin_T[counts_T].min().item() if counts_T.any() else float("inf")
        self._found[layer].append(Choices(tokens_E, margin))


def _joined(choices: Sequence[Choices]) -> Choices:
    return Choices(np.sum([c.tokens_E for c in choices], axis=0), min(c.margin for c in choices))


def tie(expected: Routing, found: Sequence[Routing]) -> int | None:
    """The layer whose router chose differently on some ranks than in `expected` because two experts tied, or None.

    Ranks may see tokens more than once, as tensor ranks and recomputation do, if all tokens equally often. A first
    difference where no two experts tie is none that rounding explains: None, as for no difference.
    """
    for layer, choices in sorted(expected.items()):
        tokens_E = _joined([ranks[layer] for ranks in found if layer in ranks]).tokens_E
        if not np.array_equal(tokens_E * choices.tokens_E.sum(), choices.tokens_E * tokens_E.sum()):
            return layer if choices.margin < TIE else None
    return None
