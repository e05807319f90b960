"""Protocols of the workers that weight sync calls: the ranks of a policy, and those of rollout engines."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # torch, which the driver does not load
    from lockstep.rl.weight_sync.shards import Shard


class BroadcastMember(Protocol):
    """A process that can take part in broadcasts of weights."""

    def open_broadcasts(self, rank: int, size: int, meetings: Sequence[tuple[str, int]]) -> bool:
        """Joins broadcast groups as this rank; returns whether all processes have come."""

    def broadcast_weights(self) -> bool:
        """Sends or receives all messages of weights; returns whether all have come."""


class WeightSender(BroadcastMember, Protocol):
    """A rank of the policy."""

    def host(self, address: str, of: str = "world") -> int:
        """Hosts a store for ranks to meet at; returns its port."""

    def open_weights(self, size: int) -> int:
        """Packs the weights that it owns into messages of at most `size` bytes; returns how many there are."""

    def weights(self, number: int) -> "list[Shard]":
        """The message of this number, from 0; empty after the last one."""

    def close_weights(self) -> None:
        """Drops the messages; does nothing where no weights are open."""


class WeightReceiver(BroadcastMember, Protocol):
    """A rank of a rollout engine."""

    def begin_update(self, version: int) -> None:
        """Begins to take the weights of a version."""

    def take(self, *shards: "list[Shard]") -> None:
        """Writes the parts of messages of shards that it holds into its weights."""

    def end_update(self) -> None:
        """Goes on under the new weights."""
