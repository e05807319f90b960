"""Items come in order, ahead of time, and errors reach the taker."""

import threading
import time

import pytest

from lockstep.data.corpus.prefetch import Prefetch


def prefetchers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_items_come_in_order_and_the_thread_ends() -> None:
    assert list(Prefetch(lambda n: n * n, range(50), depth=3)) == [n * n for n in range(50)]
    assert not prefetchers()


def test_no_more_is_made_than_asked_for() -> None:
    made: list[int] = []
    with Prefetch(made.append, range(1000), depth=2) as items:
        next(items)
        time.sleep(0.3)
        assert made == [0, 1, 2, 3]  # one taken, two waiting, one in hand
    assert not prefetchers()


def test_items_are_made_while_the_taker_works() -> None:
    ready = threading.Event()

    def make(n: int) -> int:
        if n == 1:
            ready.set()
        return n

    with Prefetch(make, range(3)) as items:
        assert next(items) == 0
        assert ready.wait(10)


def test_errors_come_after_the_items_before_them() -> None:
    def make(n: int) -> int:
        if n == 2:
            raise ValueError("no such row")
        return n

    items = Prefetch(make, range(9))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="no such row"):
        next(items)
    assert not prefetchers()
    with pytest.raises(StopIteration):
        next(items)


def test_closing_twice_and_while_full_does_not_hang() -> None:
    items = Prefetch(lambda n: n, iter(range(10**9)), depth=1)
    next(items)
    items.close()
    items.close()
    assert not prefetchers()
    assert list(items) == []
