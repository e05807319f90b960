"""Pools of processes that judge, each taken by one thread at a time and given back by it."""

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from queue import SimpleQueue
from typing import ClassVar, Generic, Protocol, Self, TypeVar


class Killable(Protocol):
    """A process that a pool ends."""

    def kill(self) -> int:
        """End it; its exit code."""
        ...


Process = TypeVar("Process", bound=Killable)
Item = TypeVar("Item")
Result = TypeVar("Result")


class ProcessPool(Generic[Process]):
    """As many threads as processes, so that an idle process is always at hand. A context manager that closes it."""

    failure: ClassVar[type[RuntimeError]]
    """What is raised where the pool cannot judge."""

    def __init__(self, workers: int, name: str) -> None:
        """
        Args:
            name: of its threads.
        """
        self._closed = False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self._idle: SimpleQueue[Process] = SimpleQueue()

    def close(self) -> None:
        """Drops what is queued, lets items in work end or meet their deadline, kills every process. May be repeated."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _each(self, work: Callable[[Item], Result], items: Iterable[Item], doing: str) -> list[Result]:
        """Results of the work on all items, in order, by the pool's threads.

        Args:
            doing: what is cut short where the pool is closed meanwhile, for the error.
        """
        if self._closed:
            raise self.failure("this pool is closed: make a new one")
        try:
            return list(self._threads.map(work, items))
        except CancelledError as error:
            raise self.failure(f"the pool was closed while {doing}") from error
