"""What travels from a policy to rollout engines, and the protocols of the workers at both ends.

It loads neither torch nor a model: the driver names these protocols, and an engine in another environment reads shards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ml_dtypes import bfloat16
from numpy.typing import NDArray

if TYPE_CHECKING:  # torch, which the driver does not load
    from lockstep.distributed.checkpoint.tensors import Box


class WeightsDiffer(RuntimeError):
    """The weights of a rollout worker are not the ones that the policy sent."""


@dataclass(frozen=True)
class Shard:
    """A piece of a logical tensor with a digest of its bits; bfloat16 is carried as uint16."""

    name: str
    box: "Box"
    bits: NDArray[Any]
    is_bfloat16: bool
    digest: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the piece."""
        return tuple(stop - start for start, stop in self.box)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.bits.dtype.itemsize

    @property
    def array(self) -> NDArray[Any]:
        """The piece in its own dtype, as a view."""
        return self.bits.view(bfloat16) if self.is_bfloat16 else self.bits


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

    def weights(self, number: int) -> list[Shard]:
        """The message of this number, from 0; empty after the last one."""

    def close_weights(self) -> None:
        """Drops the messages; does nothing where no weights are open."""


class WeightReceiver(BroadcastMember, Protocol):
    """A rank of a rollout engine."""

    def begin_update(self, version: int) -> None:
        """Begins to take the weights of a version."""

    def take(self, *shards: list[Shard]) -> None:
        """Writes the parts of messages of shards that it holds into its weights."""

    def end_update(self) -> None:
        """Goes on under the new weights."""
