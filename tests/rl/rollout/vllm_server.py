"""The process of another interpreter in which tests have vLLM engines, and the calls that it answers."""

import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from numpy.typing import NDArray

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.tensors import Box, WeightsOnly, within
from lockstep.model.config import ModelConfig
from lockstep.rl.rollout.config import EngineConfig
from lockstep.rl.rollout.vllm.engine import VllmEngine
from lockstep.rl.rollout.vllm.model import VllmModel
from lockstep.rl.weight_sync.protocol import Shard


class ShardSource(WeightsOnly):
    """A `Source` over shards that are whole tensors."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = {shard.name: shard for shard in shards}

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        return self._shards[name].array[within(box, self._shards[name].box)]


class Server:
    """Engines by number; a model in vLLM is used again by the next engine of the same limits."""

    def __init__(self) -> None:
        self._engines: list[tuple[VllmEngine, tuple[Any, ...]]] = []
        self._models: dict[tuple[Any, ...], list[VllmModel]] = {}

    def make(
        self, model: ModelConfig, config: EngineConfig, shards: Sequence[Shard], files: Mapping[str, str], dtype: str
    ) -> int:
        """A new engine; returns its number."""
        limits = repr(model), config.sequences, config.length, config.budget, config.cache_gib, dtype
        free = self._models.setdefault(limits, [])
        inside = free.pop() if free else VllmModel(model, config, dtype)
        tokenizer = Tokenizer(dict(files))
        engine = VllmEngine(inside, config, ShardSource(shards), decode=tokenizer.decode, special=tokenizer.special)
        self._engines.append((engine, (limits, inside)))
        return len(self._engines) - 1

    def free(self) -> None:
        """End what all engines do; their models are free."""
        for engine, (limits, inside) in self._engines:
            for key in list(engine._sequences):
                engine.cancel(key)
            self._models[limits].append(inside)
        self._engines = []

    def call(self, number: int, name: str, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Calls a method of an engine, or reads one of its properties."""
        found = getattr(self._engines[number][0], name)
        return found(*args, **named) if callable(found) else found


def serve(connection: Connection) -> None:
    """Answers calls until the other end is closed."""
    server = Server()
    while True:
        try:
            name, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((getattr(server, name)(*args), None))
        except Exception as error:
            connection.send((None, error))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
