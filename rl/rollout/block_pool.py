"""Blocks of a cache of keys and values: who refers to each, and which content may be found again.

A block that nobody refers to keeps its content, and its name if it has one, until its room is needed: of all such
blocks the one that was left longest ago goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from operator import mul

import numpy as np

from lockstep.model.attention.paged_kernel import BLOCK

ROOT = b""
"""What stands before the first block of a text."""


def chained(before: bytes, tokens: tuple[int, ...]) -> bytes:
    """The name of a block's content: its tokens and, through the name of the block before, all before them."""
    return blake2b(before + np.asarray(tokens, np.int64).tobytes(), digest_size=16).digest()


def blocks_alone(tokens: int, window: int | None) -> int:
    """Blocks of one kind of layer that a sequence of so many tokens needs at least, computed token by token."""
    whole = -(-tokens // BLOCK)
    return whole if window is None else min(whole, (window + BLOCK - 2) // BLOCK + 1)


def pool_sizes(
    windows: Sequence[int | None], block_bytes: Sequence[int], *, memory: int, sequences: int, length: int, budget: int
) -> list[int]:
    """Blocks of each kind of layer, so that sequences of full length use up all kinds together.

    Args:
        windows: of each kind of layer, in tokens.
        block_bytes: of a block of each kind.
        memory: bytes of all blocks together; sequences that all run at full length get no more than they can use.
        budget: tokens of one pass, whose blocks behind a window are given back after it only.
    """
    whole, once = -(-length // BLOCK), -(-budget // BLOCK)
    each = [blocks_alone(length, window) for window in windows]
    extra = [min(once, whole - blocks) for blocks in each]
    left = memory - sum(map(mul, extra, block_bytes))
    share = min(float(sequences), max(0, left) / sum(map(mul, each, block_bytes)))
    return [max(1, int(blocks * share) + more) for blocks, more in zip(each, extra, strict=True)]


class BlockPool:
    """`count` blocks, numbered from 0."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._references = [0] * count
        self._names: list[bytes | None] = [None] * count
        self._by_name: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return len(self._idle)

    def take(self) -> int:
        """A block for new content, with one reference; what it held is forgotten."""
        block, _ = self._idle.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a block."""
        self._idle.pop(block, None)
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One reference less; without a name a block's content is of no use and goes first."""
        self._references[block] -= 1
        assert self._references[block] >= 0
        if not self._references[block]:
            self._idle[block] = None
            if self._names[block] is None:
                self._idle.move_to_end(block, last=False)

    def name(self, block: int, name: bytes) -> None:
        """Let a block be found by what it holds, unless another that holds the same can be."""
        if name not in self._by_name:
            self._forget(block)
            self._names[block] = name
            self._by_name[name] = block

    def find(self, name: bytes) -> int | None:
        """The block that holds this content, if there is one."""
        return self._by_name.get(name)

    def forget_all(self) -> None:
        """Let no block be found again."""
        self._names = [None] * self.count
        self._by_name.clear()

    def _forget(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            self._names[block] = None
            del self._by_name[name]
