"""A pool of worker processes and as many threads, each of which uses one process at a time."""

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from queue import SimpleQueue
from typing import ClassVar, Generic, Protocol, Self, TypeVar


class Killable(Protocol):
    """A process that a pool can kill."""

    def kill(self) -> int:
        """Kill it; returns its exit code."""
        ...


Process = TypeVar("Process", bound=Killable)
Item = TypeVar("Item")
Result = TypeVar("Result")


class ProcessPool(Generic[Process]):
    """Maps work over items with as many threads as processes. A context manager that closes the pool."""

    failure: ClassVar[type[RuntimeError]]
    """The exception for a pool that cannot work: closed, or its processes do not start."""

    def __init__(self, workers: int, name: str) -> None:
        """
        Args:
            name: of its threads.
        """
        self._closed = False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self._idle: SimpleQueue[Process] = SimpleQueue()

    def close(self) -> None:
        """Drops queued items, lets those in work end or reach their deadline, kills every process. Idempotent."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _each(self, work: Callable[[Item], Result], items: Iterable[Item], doing: str) -> list[Result]:
        """Results of `work` on all items, in order, computed by the pool's threads.

        Args:
            doing: what the pool was doing, for the error where it is closed meanwhile.
        """
        if self._closed:
            raise self.failure("this pool is closed: make a new one")
        try:
            return list(self._threads.map(work, items))
        except CancelledError as error:
            raise self.failure(f"the pool was closed while {doing}") from error
