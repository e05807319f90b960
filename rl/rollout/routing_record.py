"""Records the experts that the tokens of completions go to, beside the blocks of the KV cache.

Whoever finds a prefix in the cache finds its experts there, and a fork copies them with keys and values. A sequence
keeps the first record of each of its tokens: that of the pass behind which the next token was drawn, or, of a prefix,
of the pass that left it in the cache. What is computed again, after a preemption or under new weights, changes nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.data.batch import Experts
from lockstep.model.attention.paged_kernel import BLOCK
from lockstep.rl.rollout.scheduling.plan import Plan, SequenceState


class RoutingRecord:
    """Experts of the tokens in the blocks of the first kind of layer, which sees all tokens and keeps its blocks."""

    def __init__(self, blocks: int) -> None:
        """
        Args:
            blocks: of that kind of layer.
        """
        self._blocks = blocks
        self._experts: NDArray[Any] | None = None

    def computed(self, plan: Plan, experts_TLK: Experts) -> None:
        """Write the experts of a pass's tokens to the blocks that they are in."""
        if self._experts is None:  # of which the system gives memory to what is written
            self._experts = np.empty((self._blocks, BLOCK, *experts_TLK.shape[1:]), experts_TLK.dtype)
        places = [place for c in plan.chunks for place in _places(c.sequence, c.start, c.start + c.length)]
        self._experts[_split(places)] = experts_TLK
        for source, copy in filter(None, (fork.copies[0] for fork in plan.forks)):
            self._experts[copy] = self._experts[source]

    def follow(self, plan: Plan) -> None:
        """Note the experts of the tokens that the sequences of a pass have gained, by it or out of the cache."""
        for sequence in [chunk.sequence for chunk in plan.chunks] + [fork.sequence for fork in plan.forks]:
            start, stop = sequence.recorded, sequence.cached
            if start < stop:
                assert self._experts is not None
                sequence.experts.append(self._experts[_split(_places(sequence, start, stop))])
                sequence.recorded = stop


def recorded(sequence: SequenceState) -> Experts:
    """The experts of a sequence's tokens, [N, L, K]: of prompt and completion but for the last, which none computes."""
    return np.concatenate(sequence.experts)


def _places(sequence: SequenceState, start: int, stop: int) -> list[tuple[int, int]]:
    """The block of each of the tokens start … stop−1, and its place in there."""
    table = sequence.tables[0]
    return [(table[place // BLOCK], place % BLOCK) for place in range(start, stop)]


def _split(places: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks, and places in them, as an index."""
    blocks, inside = zip(*places, strict=True)
    return blocks, inside
