"""Weights from one process to many on other hosts: messages of shards through a group of theirs alone.

A message is a header, which says what comes, and the bits of its shards one after the other. While the bits of one are
on their way, the sender signs those of the next and receivers put those before into place.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import accumulate
from logging import Logger
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import Store  # type: ignore[attr-defined]

from lockstep.distributed.groups import meeting_at
from lockstep.rl.weight_sync.shards import Shard

PATIENCE_S = 60.0
"""How long a message may take, and the others of a group to come."""

ALIGNED = 64
"""Bytes, at multiples of which the bits of a shard begin in a message."""


class BroadcastFailed(RuntimeError):
    """A process of the group ended, or its connection did: what came is not whole."""


class Broadcast:
    """One process's part in a group of which the first sends and all others receive."""

    def __init__(self, meeting: Store, rank: int, size: int, patience_s: float = PATIENCE_S) -> None:
        """
        Args:
            meeting: of this group alone.

        Raises:
            BroadcastFailed: when not all have come in time.
        """
        try:
            self._group: Any = dist.ProcessGroupGloo(meeting, rank, size, timedelta(seconds=patience_s))
        except RuntimeError as error:
            raise BroadcastFailed(str(error)) from error

    def send(self, messages: Iterable[Sequence[Shard]]) -> None:
        """Send messages; receivers are told when there are no more.

        Raises:
            BroadcastFailed: when not all have them.
        """
        going = None
        for shards in messages:
            bits = _joined(shards)
            if going:
                _ended(going[0])
            self._say([replace(shard, bits=np.empty(0, shard.bits.dtype)) for shard in shards], len(bits))
            going = self._begin(bits), bits
        if going:
            _ended(going[0])
        self._say(None, 0)

    def receive(self) -> Iterator[list[Shard]]:
        """The messages that the first process sends, each while the next is coming.

        Raises:
            BroadcastFailed: when not all have come.
        """
        before: list[Shard] | None = None
        while True:
            header, size = self._hear()
            bits = torch.empty(size, dtype=torch.uint8)
            coming = None if header is None else self._begin(bits)
            if before is not None:
                yield before
            if header is None or coming is None:
                return
            _ended(coming)
            before = _apart(header, bits.numpy())

    def abort(self) -> None:
        """Close all connections, at which the others' waiting ends."""
        self._group.abort()

    def _say(self, header: list[Shard] | None, size: int) -> None:
        words = torch.frombuffer(bytearray(pickle.dumps(header)), dtype=torch.uint8)
        _ended(self._begin(torch.tensor([len(words), size])))
        _ended(self._begin(words))

    def _hear(self) -> tuple[list[Shard] | None, int]:
        sizes = torch.empty(2, dtype=torch.int64)
        _ended(self._begin(sizes))
        words = torch.empty(int(sizes[0]), dtype=torch.uint8)
        _ended(self._begin(words))
        return pickle.loads(words.numpy().tobytes()), int(sizes[1])

    def _begin(self, values: torch.Tensor) -> dist.Work:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            work: dist.Work = self._group.broadcast([values], options)
            return work
        except RuntimeError as error:
            raise BroadcastFailed(str(error)) from error


class Broadcasts:
    """A process's parts in groups, which it enters and leaves as a whole."""

    def __init__(self, log: Logger) -> None:
        self._log, self._links = log, list[Broadcast]()

    def open(self, rank: int, size: int, meetings: Sequence[tuple[str, int]]) -> bool:
        """Enter groups of so many processes in this order, as the one of this rank; whether all have come."""
        self._links = []
        if rank == 0:
            self._log.info("weights go to %d processes by broadcasts", size - 1)
        return self.use(lambda links: links.extend(Broadcast(meeting_at(*m), rank, size) for m in meetings))

    def use(self, work: Callable[[list[Broadcast]], None]) -> bool:
        """Send or receive; where that fails all groups are left, which ends the others' waiting, too."""
        try:
            work(self._links)
        except BroadcastFailed as failure:
            self._log.warning("a broadcast of weights broke off: %s", str(failure))
            for link in self._links:
                link.abort()
            self._links = []
            return False
        return True


def _ended(work: dist.Work) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise BroadcastFailed(str(error)) from error


def _joined(shards: Sequence[Shard]) -> torch.Tensor:
    """The bits of all shards, [bytes]."""
    places = _places(shards)
    found = np.empty(places[-1], np.uint8)
    for shard, start in zip(shards, places, strict=False):
        found[start : start + shard.size].view(shard.bits.dtype).reshape(shard.bits.shape)[...] = shard.bits
    return torch.from_numpy(found)


def _apart(header: Sequence[Shard], bits: NDArray[Any]) -> list[Shard]:
    """Shards with their bits, which are not copied."""
    return [
        replace(shard, bits=bits[start : start + shard.size].view(shard.bits.dtype).reshape(shard.shape))
        for shard, start in zip(header, _places(header), strict=False)
    ]


def _places(shards: Sequence[Shard]) -> list[int]:
    """Where the bits of each shard begin, aligned, and where the last one's end."""
    return list(accumulate((-(-shard.size // ALIGNED) * ALIGNED for shard in shards), initial=0))
