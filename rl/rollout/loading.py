"""An engine over a checkpoint of any format."""

import gc
from pathlib import Path

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.groups import Groups, alone
from lockstep.model.config import ModelConfig, Numerics, UnknownModel
from lockstep.model.loading import DTYPES, build, transformer_of
from lockstep.model.weights.lora import merged
from lockstep.rl.rollout.config import OnUpdate
from lockstep.rl.rollout.engine import RolloutEngine


def load_rollout_engine(
    checkpoint: Path | Storage,
    *,
    dtype: str,
    length: int = 1 << 20,
    sequences: int = 64,
    cache_gib: float = 1.0,
    budget: int = 2048,
    on_update: OnUpdate = "restart",
    groups: Groups | None = None,
    numerics: Numerics = "fast",
) -> tuple[RolloutEngine, Tokenizer]:
    """A rollout engine over a checkpoint, in a world of this process alone unless `groups` says otherwise."""
    source = Checkpoint(checkpoint)
    tokenizer = Tokenizer(source.files)
    model = ModelConfig(**source.manifest["model"])
    if model.head == "value":
        raise UnknownModel(f"{checkpoint} has a value head and writes no text: give a language model's checkpoint")
    model, weights = merged(model, source)
    stage = build(model, groups or alone(), DTYPES[dtype], weights, numerics)
    gc.freeze()  # weights and libraries, which are no garbage: looking through them takes as long as a forward pass
    engine = RolloutEngine(
        transformer_of(stage),
        decode=tokenizer.decode,
        length=length,
        sequences=sequences,
        cache_gib=cache_gib,
        budget=budget,
        on_update=on_update,
    )
    return engine, tokenizer
