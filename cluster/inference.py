"""One checkpoint of any format in this process, as a rollout engine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lockstep.cluster.convert import to_lockstep
from lockstep.cluster.sources import open_source
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.groups import leave
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import load_rollout_engine


def as_lockstep(name: str, folder: Path) -> Path | Storage:
    """A checkpoint of ours: the one of this name, or what another format holds, written to a folder."""
    source, _, _ = open_source(name)
    return source.place if isinstance(source, manager.Checkpoint) else to_lockstep(name, folder)


@contextmanager
def open_engine(
    name: str, dtype: str, *, sequences: int, length: int = 1 << 20, cache_gib: float = 1.0
) -> Iterator[tuple[RolloutEngine, Tokenizer]]:
    """A rollout engine over a checkpoint of any format; other formats pass through a temporary checkpoint of ours.

    Raises:
        ValueError: one sentence on what cannot be opened.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype {dtype!r} is not supported: use bfloat16 or float32")
    try:
        with tempfile.TemporaryDirectory() as folder:
            ours = as_lockstep(name, Path(folder))
            opened = load_rollout_engine(ours, dtype=dtype, sequences=sequences, length=length, cache_gib=cache_gib)
        yield opened
    finally:
        leave()
