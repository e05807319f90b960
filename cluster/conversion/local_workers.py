"""Writes the parts of a conversion in this process, or in several that open source and target themselves."""

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
from lockstep.model.formats.registry import BadSource, Location, OpenModel, open_location


@dataclass(frozen=True)
class Worked:
    """The result of one task: digests of its parts, and the peak memory of the process so far."""

    task: int
    digests: list[str]
    process: str
    peak: int
    """Bytes above what its interpreter and imports hold, so far."""


Workers = Callable[[Conversion, OpenModel, Path | Storage, Sequence[int]], Iterator[Worked]]
"""Does the tasks of these numbers, from an open model into a folder, in any order."""


def this_process() -> str:
    """Host and process id: a name that no other process of a cluster has."""
    return f"{platform.node()} {os.getpid()}"


class PartWriter:
    """Writes the parts of a conversion's tasks in this process, and measures the memory that this takes."""

    def __init__(self, conversion: Conversion, opened: OpenModel, folder: Path | Storage) -> None:
        self._watch = Watch()
        self._target, _ = target_of(conversion, opened, folder)
        self._tasks = tasks_of(self._target.parts, conversion.part_bytes)

    def work(self, task: int) -> Worked:
        """Write all parts of one task.

        Raises:
            BadSource: when the source lacks a tensor.
        """
        try:
            digests = [self._target.write(part) for part in self._tasks[task]]
        except KeyError as error:
            raise BadSource(str(error.args[0])) from error
        return Worked(task, digests, this_process(), self._watch.peak())


def processes(
    conversion: Conversion, opened: OpenModel, folder: Path | Storage, tasks: Sequence[int]
) -> Iterator[Worked]:
    """`Workers` on this machine: as many processes as the conversion asks for, or this one alone."""
    if conversion.workers == 1 or len(tasks) < 2:
        yield from map(PartWriter(conversion, opened, folder).work, tasks)
        return
    pool = ProcessPoolExecutor(min(conversion.workers, len(tasks)), get_context("spawn"), follow_parent)
    try:
        yield from pool.map(partial(work, conversion, opened.location, folder), tasks)
    except BrokenProcessPool as error:
        raise BadConversion(
            "a worker process died, perhaps for want of memory: run the same command again to go on, "
            "with fewer workers if it dies again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def work(conversion: Conversion, location: Location, folder: Path | Storage, task: int) -> Worked:
    """Do one task in a worker process, which opens the source by its location: a Hub name was resolved before."""
    return _writer(conversion, location, folder).work(task)


@lru_cache(1)
def _writer(conversion: Conversion, location: Location, folder: Path | Storage) -> PartWriter:
    """The writer of this process, which opens the source once."""
    return PartWriter(conversion, open_location(location), folder)
