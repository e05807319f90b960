"""Blends datasets by weight: which source gives sample n, and which of its samples that is, follows from a formula.

The sources are the leaves of a binary tree. Each inner node splits the samples that reach it in the ratio p : q − p of
its children's weights: the first child has got ⌊n·p/q + ½⌋ of the first n. So nothing needs to be remembered, weights
are exact fractions, and after every q samples of a node its shares are exact. Joining the two lightest nodes first
(Huffman 1952) makes a node's grandparent at least twice as heavy as the node, its ancestors grow at least like
Fibonacci's numbers, and rounding at each level, shrunk by the shares below it, adds up to less than 1.68 samples, for
any number of sources, any weights and any n.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count

import numpy as np

from lockstep.data.batch import Ints

BOUND = 1.68
"""Bound on the deviation of a source from its exact share, in samples, at any n: half the sum of 1/Fibonacci(i)."""


@dataclass(frozen=True)
class _Node:
    """A source, or two nodes of which the first gets p of q samples."""

    source: int
    children: "tuple[_Node, _Node] | None" = None
    p: int = 0
    q: int = 1

    def first(self, samples: int) -> int:
        """How many of the first so many samples go to the first child."""
        return (2 * samples * self.p + self.q) // (2 * self.q)


def _join(first: _Node, second: _Node, share: Fraction) -> _Node:
    return _Node(-1, (first, second), share.numerator, share.denominator)


class Blend:
    """An endless sequence of (source, sample of the source) in exact proportions."""

    def __init__(self, weights: Sequence[float]) -> None:
        """
        Args:
            weights: one for each source, positive; they are taken as the decimal numbers that they are written as.
        """
        assert weights
        assert all(w > 0 for w in weights)
        exact = [Fraction(str(w)) for w in weights]
        self.shares = [w / sum(exact) for w in exact]
        """Exact, they add up to 1."""
        ticket = count()
        heap = [(w, next(ticket), _Node(source)) for source, w in enumerate(self.shares)]
        heapq.heapify(heap)
        while len(heap) > 1:  # weights that are equal join in order, so the tree is a function of the weights
            (a, _, light), (b, _, heavy) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (a + b, next(ticket), _join(heavy, light, b / (a + b))))
        self._root = heap[0][2]

    def take(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """The sources of samples start … stop, and their numbers within the sources, both [stop − start]."""
        sources, numbers = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        self._fill(self._root, start, np.arange(stop - start), sources, numbers)
        return sources, numbers

    def counts(self, samples: int) -> list[int]:
        """The number of samples from each source among the first `samples`."""
        found = [0] * len(self.shares)
        open_nodes = [(self._root, samples)]
        while open_nodes:
            node, n = open_nodes.pop()
            if node.children is None:
                found[node.source] = n
            else:
                first = node.first(n)
                open_nodes += [(node.children[0], first), (node.children[1], n - first)]
        return found

    def _fill(self, node: _Node, start: int, places: Ints, sources: Ints, numbers: Ints) -> None:
        """Samples start, start + 1, … of a node stand at these places of the result."""
        if node.children is None:
            sources[places] = node.source
            numbers[places] = start + np.arange(len(places))
            return
        # Python's integers, because samples times weights may pass 64 bits
        given = np.array([node.first(start + i) for i in range(len(places) + 1)], dtype=object)
        to_first = (given[1:] != given[:-1]).astype(bool)
        self._fill(node.children[0], int(given[0]), places[to_first], sources, numbers)
        self._fill(node.children[1], start - int(given[0]), places[~to_first], sources, numbers)
