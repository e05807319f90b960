"""RolloutWorker: generates completions with a rollout engine and takes new weights from the policy."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.model.config import Numerics
from lockstep.rl.rollout.config import OPENING, RolloutConfig
from lockstep.rl.rollout.output_processor import OutputProcessor, RolloutRequest
from lockstep.rl.rollout.protocol import Engine
from lockstep.rl.types import Completion
from lockstep.rl.weight_sync.broadcast import Broadcast
from lockstep.rl.weight_sync.protocol import Shard
from lockstep.rl.workers.agreement import Loaded, digest_of, loaded
from lockstep.rl.workers.rank import RankWorker


class RolloutWorker(RankWorker):
    """One tensor-parallel rank of a rollout engine; all ranks of a model get the same calls in the same order."""

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
        """Loads this tensor rank's part of the model as weight version 0."""
        opening = import_module(OPENING[limits.engine])
        self.engine: Engine = opening.open_rank(
            checkpoint, limits, dtype=dtype, numerics=numerics, rank=rank, meeting=(address, port)
        )
        given = digest_of(dtype, limits, numerics)
        weights = {f"the weights of tensor rank {rank}": self.engine.weights_digest()}
        self._loaded = loaded(given, digest_of(Checkpoint(checkpoint).manifest), weights)
        self.processor, self._speaks = OutputProcessor(self.engine), rank == 0
        self.log.info("ready for %d sequences", limits.sequences)

    def loaded(self) -> Loaded:
        """What this rank loaded as weight version 0."""
        return self._loaded

    def begin_update(self, version: int) -> None:
        """Begins to take the weights of a version; see `Engine.begin_update`."""
        self.engine.begin_update(version)

    def take(self, *shards: list[Shard]) -> None:
        """Writes the parts of messages of shards that this rank holds into its weights."""
        for part in shards:
            self.engine.take(part)

    def broadcast_weights(self) -> bool:
        """Receives all messages of the policy's ranks by broadcasts; returns whether all have come."""
        return self.broadcasts.use(self._receive)

    def _receive(self, links: Sequence[Broadcast]) -> None:
        for link in links:
            for shards in link.receive():
                self.engine.take(shards)

    def end_update(self) -> None:
        """Goes on under the new weights, checked to be whole; see `Engine.end_update`."""
        self.engine.end_update()
        self.step = self.engine.weight_version

    def settle(self) -> list[Completion]:
        """Runs until new weights may come; returns the completions that ended, where `on_update` lets them end."""
        ended = []
        while not self.engine.ready_for_update():
            ended += self.processor.step()
        return ended if self._speaks else []

    def work(self, requests: list[RolloutRequest], passes: int) -> list[Completion]:
        """Adds requests and generates until a completion has ended, for at most so many forward passes.

        Returns:
            The completions that have ended, on the first rank; nothing on the others.
        """
        for request in requests:
            self.processor.add(request)
        for _ in range(passes):
            ended = self.processor.step()
            if ended:
                return ended if self._speaks else []
        return []

    def drop(self) -> None:
        """Drops all requests, and the prefix cache."""
        self.processor.drop()
        self.engine.forget()

    def release(self) -> None:
        """Frees the KV cache and the weights for other processes on the same device."""
        self.engine.release(weights=True)
