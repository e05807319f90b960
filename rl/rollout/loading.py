"""Opens checkpoints of any format as rollout engines."""

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups, alone, join, leave
from lockstep.distributed.world.meeting import meeting_at
from lockstep.model.config import Numerics
from lockstep.model.formats.lockstep import read_language_model, write_checkpoint
from lockstep.model.formats.recast import Recast
from lockstep.model.formats.registry import OpenModel, open_model
from lockstep.model.loading import DTYPES, build, transformer_of
from lockstep.rl.rollout.config import EngineConfig, Meeting, RolloutConfig
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.protocol import Engine


def load_rollout_engine(
    checkpoint: Path | Storage,
    config: EngineConfig,
    *,
    dtype: str,
    groups: Groups | None = None,
    numerics: Numerics = "fast",
    records_routing: bool = False,
) -> tuple[RolloutEngine, Tokenizer]:
    """Load a checkpoint of ours as a rollout engine, in a world of this process alone unless `groups` is given."""
    model, weights, tokenizer = read_language_model(checkpoint)
    stage = build(model, groups or alone(), DTYPES[dtype], weights, numerics)
    gc.freeze()  # weights and libraries, which are no garbage: looking through them takes as long as a forward pass
    engine = RolloutEngine(
        transformer_of(stage),
        config,
        decode=tokenizer.decode,
        special=tokenizer.special,
        records_routing=records_routing,
    )
    return engine, tokenizer


def open_rank(
    checkpoint: Path | Storage, config: RolloutConfig, *, dtype: str, numerics: Numerics, rank: int, meeting: Meeting
) -> Engine:
    """Load a checkpoint of ours as the rollout engine of one tensor rank; all ranks of a model call this together."""
    groups = join(Layout(tensor=config.tensor), rank=rank, meeting=meeting_at(*meeting))
    records = config.replay_routing
    return load_rollout_engine(
        checkpoint, config, dtype=dtype, groups=groups, numerics=numerics, records_routing=records
    )[0]


def to_lockstep(name: str, destination: Path, *, dtype: str | None = None) -> Path:
    """Convert a model of any format to our sharded checkpoint `destination/step-000000`, without optimizer state."""
    return _written(open_model(name), destination, dtype)


def as_lockstep(opened: OpenModel, folder: Path) -> Path | Storage:
    """A checkpoint of ours: the one that was opened, or what another format holds, converted into a folder."""
    source = opened.source
    return source.place if isinstance(source, Checkpoint) else _written(opened, folder)


def _written(opened: OpenModel, destination: Path, dtype: str | None = None) -> Path:
    weights = Recast(opened.source, opened.config, dtype, states=False)
    return write_checkpoint(weights, opened.config, opened.files, destination)


@contextmanager
def open_engine(name: str, dtype: str, config: EngineConfig) -> Iterator[tuple[RolloutEngine, Tokenizer]]:
    """Open a checkpoint of any format as a rollout engine; other formats become a temporary checkpoint of ours first.

    Raises:
        ValueError: one sentence on what cannot be opened.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype={dtype!r} is not supported: use bfloat16 or float32")
    try:
        with tempfile.TemporaryDirectory() as folder:
            ours = as_lockstep(open_model(name), Path(folder))
            opened = load_rollout_engine(ours, config, dtype=dtype)
        yield opened
    finally:
        leave()
