"""Base class of workers that are one rank of a torch.distributed world and take part in broadcasts of weights."""

from collections.abc import Sequence

import ray
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lockstep.distributed.world.meeting import host_meeting
from lockstep.distributed.world.network import use_interface_of
from lockstep.rl.weight_sync.broadcast import Broadcasts
from lockstep.rl.workers.base import Worker


class RankWorker(Worker):
    """One rank of a model."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        use_interface_of(ray.util.get_node_ip_address())
        self.broadcasts = Broadcasts(self.log)
        self._meetings: dict[str, TCPStore] = {}

    def host(self, address: str, of: str = "world") -> int:
        """Hosts a TCPStore for ranks to meet at, on this node's address; returns its port.

        Args:
            of: what the ranks meet for; the store replaces the last one of the same name.
        """
        self._meetings[of] = host_meeting(address)
        return int(self._meetings[of].port)

    def open_broadcasts(self, rank: int, size: int, meetings: Sequence[tuple[str, int]]) -> bool:
        """Joins broadcast groups as this rank; see `Broadcasts.open`."""
        return self.broadcasts.open(rank, size, meetings)
