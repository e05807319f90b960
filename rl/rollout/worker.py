"""The rollout workers' processes."""

from pathlib import Path

from lockstep.rl.rollout.engine import load_rollout_engine
from lockstep.rl.rollout.sampling import SamplingConfig
from lockstep.rl.sync import Shard
from lockstep.rl.types import Prompt, Rollout
from lockstep.rl.worker import Worker


class RolloutWorker(Worker):
    """A whole model with a KV cache that writes completions."""

    role = "rollout"

    def start(self, checkpoint: Path, dtype: str, sequences: int, length: int) -> None:
        """Load the model as weight version 0."""
        self.engine = load_rollout_engine(checkpoint, dtype=dtype, sequences=sequences, length=length)[0]
        self.log.info("ready for %d sequences", sequences)

    def receive(self, version: int, *shards: list[Shard]) -> None:
        """Take over new weights."""
        self.engine.receive(version, [s for part in shards for s in part])
        self.step = version

    def generate(self, prompts: list[Prompt], sampling: SamplingConfig, samples: int, seed: int) -> list[Rollout]:
        """Completions of all prompts."""
        return list(self.engine.generate(prompts, sampling, samples=samples, seed=seed))
