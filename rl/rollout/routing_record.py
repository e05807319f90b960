"""Records the experts that the tokens of completions go to, beside the blocks of the KV cache.

Whoever finds a prefix in the cache finds its experts there, and a fork copies them with keys and values. A sequence
keeps the first record of each of its tokens: that of the pass behind which the next token was drawn, or, of a prefix,
of the pass that left it in the cache. What is computed again, after a preemption or under new weights, changes nothing.
"""

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
        places = [np.arange(c.start, c.start + c.length) for c in plan.chunks]
        tables = [_blocks_of(c.sequence, c.start, c.start + c.length) for c in plan.chunks]
        self._experts[np.concatenate(tables), np.concatenate(places) % BLOCK] = experts_TLK
        for source, copy in filter(None, (fork.copies[0] for fork in plan.forks)):
            self._experts[copy] = self._experts[source]

    def follow(self, plan: Plan) -> None:
        """Note the experts of the tokens that the sequences of a pass have gained, by it or out of the cache."""
        for sequence in [chunk.sequence for chunk in plan.chunks] + [fork.sequence for fork in plan.forks]:
            start, stop = sequence.recorded, sequence.cached
            if start < stop:
                assert self._experts is not None
                blocks = _blocks_of(sequence, start, stop)
                sequence.experts.append(self._experts[blocks, np.arange(start, stop) % BLOCK])
                sequence.recorded = stop


def recorded(sequence: SequenceState) -> Experts:
    """The experts of a sequence's tokens, [N, L, K]: of prompt and completion but for the last, which none computes."""
    return np.concatenate(sequence.experts)


def _blocks_of(sequence: SequenceState, start: int, stop: int) -> NDArray[np.int64]:
    """The block of each of the tokens start … stop−1."""
    first = start // BLOCK
    table = np.array(sequence.tables[0][first : (stop - 1) // BLOCK + 1])
    return table[np.arange(start, stop) // BLOCK - first]
