"""The rollout workers' processes."""

from collections.abc import Sequence
from pathlib import Path

from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.groups import join, meeting_at
from lockstep.distributed.layout import Layout
from lockstep.model.config import Numerics
from lockstep.rl.rollout.config import RolloutConfig
from lockstep.rl.rollout.loading import load_rollout_engine
from lockstep.rl.rollout.output_processor import OutputProcessor, RolloutRequest
from lockstep.rl.rollout.protocol import Engine
from lockstep.rl.types import Completion
from lockstep.rl.weight_sync.broadcast import Broadcast
from lockstep.rl.weight_sync.shards import Shard
from lockstep.rl.workers.rank import RankWorker


class RolloutWorker(RankWorker):
    """One tensor rank of a model with a KV cache that writes completions; all ranks of a model make the same calls."""

    role = "rollout"

    def start(
        self,
        rank: int,
        address: str,
        port: int,
        checkpoint: Path | Storage,
        dtype: str,
        limits: RolloutConfig,
        numerics: Numerics = "fast",
    ) -> None:
        """Load this tensor rank's part of the model as weight version 0."""
        groups = join(Layout(tensor=limits.tensor), rank=rank, meeting=meeting_at(address, port))
        self.engine: Engine = load_rollout_engine(checkpoint, limits, dtype=dtype, groups=groups, numerics=numerics)[0]
        self.writer, self._speaks = OutputProcessor(self.engine), rank == 0
        self.log.info("ready for %d sequences", limits.sequences)

    def begin_update(self, version: int) -> None:
        """See `Engine.begin_update`."""
        self.engine.begin_update(version)

    def take(self, *shards: list[Shard]) -> None:
        """Fill what this rank holds of some shards."""
        for part in shards:
            self.engine.take(part)

    def broadcast_weights(self) -> bool:
        """Fill what this rank holds of what the policy's ranks send; whether all has come."""
        return self.broadcasts.use(self._receive)

    def _receive(self, links: Sequence[Broadcast]) -> None:
        for link in links:
            for shards in link.receive():
                self.engine.take(shards)

    def end_update(self) -> None:
        """See `Engine.end_update`."""
        self.engine.end_update()
        self.step = self.engine.weight_version

    def settle(self) -> list[Completion]:
        """Completions that have to end before new weights may come, where `on_update` lets them end."""
        ended = []
        while not self.engine.ready_for_update():
            ended += self.writer.step()
        return ended if self._speaks else []

    def work(self, orders: list[RolloutRequest], passes: int) -> list[Completion]:
        """Take orders and go on writing: until a completion has ended, but for so many forward passes at most."""
        for order in orders:
            self.writer.add(order)
        for _ in range(passes):
            ended = self.writer.step()
            if ended:
                return ended if self._speaks else []
        return []

    def drop(self) -> None:
        """Forget all orders, and the keys and values of what was written."""
        self.writer.drop()
        self.engine.forget()

    def release(self) -> None:
        """Give memory back to those who share this process's device, that of the weights included."""
        self.engine.release(weights=True)
