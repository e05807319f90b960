"""Broadcasts of weights: whole for all who receive them, or an end that nobody waits for."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore  # type: ignore[attr-defined]

from lockstep.distributed.checkpoint.tensors import digest
from lockstep.distributed.world.meeting import host_meeting
from lockstep.rl.weight_sync.broadcast import Broadcast, BroadcastFailed, Broadcasts
from lockstep.rl.weight_sync.protocol import Shard

LONG_S = 60.0


class Group:
    """Threads that each take part in a broadcast."""

    def __init__(self, size: int) -> None:
        self._threads = ThreadPoolExecutor(size)
        self._meeting = host_meeting("127.0.0.1")
        self.parts = [Broadcasts(logging.getLogger()) for _ in range(size)]
        meetings = [("127.0.0.1", self._meeting.port)]
        opened = [self._threads.submit(part.open, rank, size, meetings) for rank, part in enumerate(self.parts)]
        assert all(each.result(LONG_S) for each in opened)

    def each(self, *works: Callable[[Broadcast], Any]) -> list[Future[bool]]:
        """Have all do something at the same time; whether it went well."""
        return [
            self._threads.submit(part.use, lambda links, work=work: work(links[0]))
            for part, work in zip(self.parts, works, strict=True)
        ]


@pytest.fixture(scope="module")
def three() -> Group:
    return Group(3)


def shard(name: str, shape: Sequence[int], is_bfloat16: bool, seed: int) -> Shard:
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, 2 if is_bfloat16 else 4), np.uint8)
    values = bits.view(np.uint16 if is_bfloat16 else np.float32)[..., 0]
    box = tuple((seed % 7, seed % 7 + n) for n in shape)
    return Shard(name, box, values, is_bfloat16, digest(values))


shards = st.builds(
    shard,
    st.text("ab.é", max_size=4),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 99),
)


@settings(max_examples=60, deadline=None)
@given(messages=st.lists(st.lists(shards, max_size=5), max_size=5))
def test_all_receive_what_one_sends(messages: list[list[Shard]], three: Group) -> None:
    came: list[list[list[Shard]]] = [[], []]
    works = [lambda link, into=into: into.extend(link.receive()) for into in came]
    assert all(each.result(LONG_S) for each in three.each(lambda link: link.send(messages), *works))
    for found in came:
        assert [[header(s) for s in message] for message in found] == [[header(s) for s in m] for m in messages]
        for one in chain(*found):
            assert digest(one.bits) == one.digest
            assert one.bits.shape == one.shape


def header(of: Shard) -> tuple[Any, ...]:
    return of.name, of.box, of.is_bfloat16, of.digest


@pytest.mark.parametrize("leaves", [0, 1, 2])
def test_whoever_leaves_ends_it_for_all(leaves: int) -> None:
    group = Group(3)
    message = [shard("a", (300, 1000), False, 1)]
    begun = time.monotonic()

    def leave(rank: int, number: int) -> None:
        if leaves == rank and number == 2:
            raise BroadcastFailed("has left")

    def messages() -> Iterator[list[Shard]]:
        for number in range(200):
            leave(0, number)
            yield message

    def receive(rank: int, link: Broadcast) -> None:
        for number, _ in enumerate(link.receive()):
            leave(rank, number)

    works = group.each(lambda link: link.send(messages()), partial(receive, 1), partial(receive, 2))
    assert not any(work.result(LONG_S) for work in works)
    assert time.monotonic() - begun < LONG_S / 2, "somebody waited for one who had left"


def test_a_group_that_is_not_complete_is_not_waited_for_long() -> None:
    with pytest.raises(BroadcastFailed):
        Broadcast(HashStore(), 0, 2, patience_s=1.0)
