"""Broadcasts of weights from one process to many on other hosts, through a gloo process group of their own.

A message is a pickled header, which lists its shards, and the bits of the shards one after the other. While the bits of
one message are on their way, the sender makes the next one with its digests, and receivers write the one before.
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

from lockstep.distributed.world.meeting import meeting_at
from lockstep.rl.weight_sync.protocol import Shard

PATIENCE_S = 60.0
"""Seconds that a message may take, and that the processes of a group wait for each other."""

ALIGNED = 64
"""Alignment of each shard's bits in a message, in bytes."""


class BroadcastFailed(RuntimeError):
    """A process of the group or its connection ended: the weights that came are incomplete."""


class Broadcast:
    """One process's end of a group in which rank 0 sends and all others receive."""

    def __init__(self, meeting: Store, rank: int, size: int, patience_s: float = PATIENCE_S) -> None:
        """
        Args:
            meeting: a store that only this group uses.
            patience_s: seconds that each operation may take.

        Raises:
            BroadcastFailed: when not all have come in time.
        """
        try:
            self._group: Any = dist.ProcessGroupGloo(meeting, rank, size, timedelta(seconds=patience_s))
        except RuntimeError as error:
            raise BroadcastFailed(str(error)) from error

    def send(self, messages: Iterable[Sequence[Shard]]) -> None:
        """Broadcasts messages, then their end.

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
        """Yields the messages that rank 0 sends, each while the next one is being received.

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
        """Closes all connections, which ends the waiting of the others, too."""
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
    """One process's ends of several broadcast groups, which are opened and given up together."""

    def __init__(self, log: Logger) -> None:
        self._log, self._links = log, list[Broadcast]()

    def open(self, rank: int, size: int, meetings: Sequence[tuple[str, int]]) -> bool:
        """Joins groups of `size` processes as this rank, one after the other; returns whether all processes have come.

        Args:
            meetings: address and port of each group's store.
        """
        self._links = []
        if rank == 0:
            self._log.info("weights go to %d processes by broadcasts", size - 1)
        return self.use(lambda links: links.extend(Broadcast(meeting_at(*m), rank, size) for m in meetings))

    def use(self, work: Callable[[list[Broadcast]], None]) -> bool:
        """Sends or receives; returns whether it went well. Where it fails all groups are aborted."""
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
    """The bits of all shards in one buffer, [bytes]."""
    places = _places(shards)
    found = np.empty(places[-1], np.uint8)
    for shard, start in zip(shards, places, strict=False):
        found[start : start + shard.size].view(shard.bits.dtype).reshape(shard.bits.shape)[...] = shard.bits
    return torch.from_numpy(found)


def _apart(header: Sequence[Shard], bits: NDArray[Any]) -> list[Shard]:
    """Shards whose bits are views of a message's buffer."""
    return [
        replace(shard, bits=bits[start : start + shard.size].view(shard.bits.dtype).reshape(shard.shape))
        for shard, start in zip(header, _places(header), strict=False)
    ]


def _places(shards: Sequence[Shard]) -> list[int]:
    """Offsets in bytes of each shard's bits, aligned, and the end of the last one."""
    return list(accumulate((-(-shard.size // ALIGNED) * ALIGNED for shard in shards), initial=0))
