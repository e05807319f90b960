"""Traces the first steps of each trainer rank with torch.profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lockstep.cluster.records.progress import Progress
from lockstep.distributed.profiler import FIRST, LAST
from lockstep.rl.workers.stubs import ModelWorker
from lockstep.rl.workers.worker_groups import ModelGroup


@contextmanager
def traced(policy: ModelGroup, folder: Path | None, progress: Progress) -> Iterator[None]:
    """Trace the first steps that are taken within this block.

    Args:
        folder: for `rank-0.json` and so on; None for no traces.
    """
    if folder is None:
        yield
        return
    policy.call(ModelWorker.open_trace, folder.resolve())
    yield
    if all(policy.call(ModelWorker.close_trace)):
        progress.say(
            f"traces of steps {FIRST} to {LAST}: {folder}/rank-*.json, to be opened in https://ui.perfetto.dev"
        )
    else:
        progress.say(f"no traces in {folder}: they begin with step {FIRST}")
