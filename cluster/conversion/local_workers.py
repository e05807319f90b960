"""Who writes the parts of a conversion: this process, or several that open the source and the target for themselves."""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

from lockstep.cluster.conversion.memory import Watch
from lockstep.cluster.conversion.plan import BadConversion, Conversion, target_of, tasks_of
from lockstep.data.child_process import follow_parent
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.model.formats.registry import open_source
from lockstep.model.formats.target import Part, Target


@dataclass(frozen=True)
class Worked:
    """What one process says of a task."""

    task: int
    digests: list[str]
    process: str
    peak: int
    """Bytes above what its interpreter and imports hold, so far."""


Workers = Callable[[Conversion, Path | Storage, Sequence[int]], Iterator[Worked]]
"""Does the tasks of these numbers, writing into a folder, in any order."""


def this_process() -> str:
    """A name that no other process of a cluster has."""
    return f"{platform.node()} {os.getpid()}"


def processes(conversion: Conversion, folder: Path | Storage, tasks: Sequence[int]) -> Iterator[Worked]:
    """`Workers` on this machine: as many processes as the conversion asks for, or this one alone."""
    if conversion.workers == 1 or len(tasks) < 2:
        _opened.cache_clear()
        yield from (work(conversion, folder, task) for task in tasks)
        return
    pool = ProcessPoolExecutor(min(conversion.workers, len(tasks)), get_context("spawn"), follow_parent)
    try:
        yield from pool.map(partial(work, conversion, folder), tasks)
    except BrokenProcessPool as error:
        raise BadConversion(
            "a worker process died, perhaps for want of memory: run the same command again to go on, "
            "with fewer workers if it dies again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def work(conversion: Conversion, folder: Path | Storage, task: int) -> Worked:
    """Do one task."""
    target, tasks, watch = _opened(conversion, folder)
    digests = [target.write(part) for part in tasks[task]]
    return Worked(task, digests, this_process(), watch.peak())


@lru_cache(1)
def _opened(conversion: Conversion, folder: Path | Storage) -> tuple[Target, list[list[Part]], Watch]:
    """Once in a process."""
    watch = Watch()
    target, _ = target_of(conversion, open_source(conversion.source), folder)
    return target, tasks_of(target.parts, conversion.part_bytes), watch
