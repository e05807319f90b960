"""Prefetching: a background thread makes items ahead of time, in order."""

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

T = TypeVar("T")

_PATIENCE = 0.1
"""Seconds after which a waiting thread looks whether it is still wanted."""


class Prefetch(Generic[T]):
    """Iterates over make(key) for each key, at most `depth` items ahead; taking an item raises what make raised."""

    def __init__(self, make: Callable[[int], T], keys: Iterable[int], *, depth: int = 2) -> None:
        self._queue: Queue[tuple[str, T | BaseException | None]] = Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(make, iter(keys)), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while not self._closed.is_set():
            try:
                kind, item = self._queue.get(timeout=_PATIENCE)
            except Empty:
                continue
            if kind == "item":
                return item  # type: ignore[return-value]  # the kind says what it is
            self.close()
            if isinstance(item, BaseException):
                raise item
        raise StopIteration

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; items that were made and not taken are dropped. A second call does nothing."""
        self._closed.set()
        self._thread.join()

    def _fill(self, make: Callable[[int], T], keys: Iterator[int]) -> None:
        try:
            for key in keys:
                if self._closed.is_set() or not self._put("item", make(key)):
                    return
            self._put("end", None)
        except BaseException as error:  # the taker raises it
            self._put("error", error)

    def _put(self, kind: str, item: T | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put((kind, item), timeout=_PATIENCE)
            except Full:
                continue
            return True
        return False
