"""A worker that is one rank of a model's world, and of the groups that weights travel in."""

from collections.abc import Sequence

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lockstep.distributed.groups import host_meeting
from lockstep.rl.weight_sync.broadcast import Broadcasts
from lockstep.rl.workers.base import Worker


class RankWorker(Worker):
    """One process of a model."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.broadcasts = Broadcasts(self.log)
        self._meetings: dict[str, TCPStore] = {}

    def host(self, address: str, of: str = "world") -> int:
        """Host a meeting of ranks at this node's address, in the place of its kind's last one; returns its port."""
        self._meetings[of] = host_meeting(address)
        return int(self._meetings[of].port)

    def open_broadcasts(self, rank: int, size: int, meetings: Sequence[tuple[str, int]]) -> bool:
        """See `Broadcasts.open`."""
        return self.broadcasts.open(rank, size, meetings)
