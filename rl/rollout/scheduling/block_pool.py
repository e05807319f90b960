"""Reference-counted blocks of a KV cache, and prefix caching by the hash of what a block holds.

A block without references keeps its content, and its name (the hash) if it has one, until it is taken for new content.
Such blocks are taken in the order in which they were released, those without a name before all others.
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from operator import mul

import numpy as np

from lockstep.model.attention.paged_kernel import BLOCK

ROOT = b""
"""The name before that of a text's first block."""


def chained(before: bytes, tokens: tuple[int, ...]) -> bytes:
    """The name of a block: a hash of its tokens and, through the block before, of all tokens before them."""
    return blake2b(before + np.asarray(tokens, np.int64).tobytes(), digest_size=16).digest()


def blocks_alone(tokens: int, window: int | None) -> int:
    """The fewest blocks of one kind of layer that a sequence of this many tokens needs, computed token by token."""
    whole = -(-tokens // BLOCK)
    return whole if window is None else min(whole, (window + BLOCK - 2) // BLOCK + 1)


def pool_sizes(
    windows: Sequence[int | None], block_bytes: Sequence[int], *, memory: int, sequences: int, length: int, budget: int
) -> list[int]:
    """Number of blocks for each kind of layer, such that sequences of full length use up all kinds at the same time.

    Args:
        windows: of each kind of layer, in tokens.
        block_bytes: of a block of each kind.
        memory: bytes of all blocks together, at most; never more than the sequences need when all have full length.
        budget: tokens of one pass; its blocks behind a sliding window are released only after it.
    """
    whole, once = -(-length // BLOCK), -(-budget // BLOCK)
    each = [blocks_alone(length, window) for window in windows]
    extra = [min(once, whole - blocks) for blocks in each]
    left = memory - sum(map(mul, extra, block_bytes))
    share = min(float(sequences), max(0, left) / sum(map(mul, each, block_bytes)))
    return [max(1, int(blocks * share) + more) for blocks, more in zip(each, extra, strict=True)]


class BlockPool:
    """`count` blocks, numbered from 0, with their reference counts and names."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._references = [0] * count
        self._names: list[bytes | None] = [None] * count
        self._by_name: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))

    @property
    def free(self) -> int:
        """Number of blocks without references, which can be taken."""
        return len(self._idle)

    def take(self) -> int:
        """Take a free block for new content, with one reference; its old content can no longer be found."""
        block, _ = self._idle.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block."""
        self._idle.pop(block, None)
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Remove a reference from a block; one without a name is taken again first: nobody can find its content."""
        self._references[block] -= 1
        assert self._references[block] >= 0
        if not self._references[block]:
            self._idle[block] = None
            if self._names[block] is None:
                self._idle.move_to_end(block, last=False)

    def drop(self, block: int) -> bool:
        """Remove a reference from a block whose content is in doubt; returns whether nobody holds or finds it now."""
        if self._references[block] == 1:
            self._forget(block)
        self.release(block)
        return not self._references[block]

    def name(self, block: int, name: bytes) -> None:
        """Let `find` return a block for the hash of its content, unless it returns another block for it already."""
        if name not in self._by_name:
            self._forget(block)
            self._names[block] = name
            self._by_name[name] = block

    def find(self, name: bytes) -> int | None:
        """The block whose content has this hash, or None."""
        return self._by_name.get(name)

    def forget_all(self) -> None:
        """Empty the prefix cache: no block is found by its content any more."""
        self._names = [None] * self.count
        self._by_name.clear()

    def _forget(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            self._names[block] = None
            del self._by_name[name]
