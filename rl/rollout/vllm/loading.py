"""Opens checkpoints of ours as rollout engines that run on vLLM."""

from pathlib import Path

from lockstep.distributed.checkpoint.storage import Storage
from lockstep.model.config import Numerics
from lockstep.model.formats.lockstep import read_language_model
from lockstep.rl.rollout.config import Meeting, RolloutConfig
from lockstep.rl.rollout.protocol import Engine
from lockstep.rl.rollout.vllm.engine import VllmEngine
from lockstep.rl.rollout.vllm.model import VllmModel


def open_rank(
    checkpoint: Path | Storage, config: RolloutConfig, *, dtype: str, numerics: Numerics, rank: int, meeting: Meeting
) -> Engine:
    """Load a checkpoint of ours as the rollout engine of a model's only rank, which meets no others."""
    assert (numerics, rank, config.tensor) == ("fast", 0, 1), "recipes that say otherwise are refused"
    model, weights, tokenizer = read_language_model(checkpoint)
    inside = VllmModel(model, config, dtype)
    return VllmEngine(inside, config, weights, decode=tokenizer.decode, special=tokenizer.special)
