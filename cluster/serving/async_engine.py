"""Runs an engine in a thread of its own for the tasks of an asyncio event loop.

Requests go to the thread through a queue, and the tokens of each forward pass come back to the loop together. The state
of the loop (outlets, whether the engine failed) is changed on the loop only; the engine is called by its thread only,
except for its statistics.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Self

from lockstep.rl.rollout.output_processor import CompletionFailed
from lockstep.rl.rollout.protocol import Engine, FailedOutput, Output, PromptOutput, Request, Statistics, TokenOutput

log = logging.getLogger(__name__)

Command = Callable[[], None]
Given = TokenOutput | PromptOutput
"""What requests that have not failed give."""


class Busy(Exception):
    """As many completions run and wait as may."""


class Ended(Exception):
    """The server was closed before a completion ended."""


class EngineFailed(Exception):
    """The engine raised an error that no single request caused; it serves no more requests."""


class Outlet:
    """The queue through which the tokens of some requests come back to the event loop."""

    def __init__(self, keys: set[str | int]) -> None:
        self.open = keys
        """Keys of the requests that have not ended."""
        self._unread = len(keys)
        self._items: asyncio.Queue[Given | Exception] = asyncio.Queue()

    def put(self, item: Output | Exception) -> None:
        """Add an output, or an exception that ends all requests; the failure of one is such an exception."""
        if not isinstance(item, Exception) and item.finish_reason:
            self.open.discard(item.key)
        self._items.put_nowait(CompletionFailed(item.reason) if isinstance(item, FailedOutput) else item)

    async def outputs(self) -> AsyncIterator[Given]:
        """Outputs in the order in which they are computed, up to the last one of the last request."""
        while self._unread:
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            self._unread -= bool(item.finish_reason)
            yield item


class AsyncEngine:
    """Completions of one engine for many tasks of an event loop; an asynchronous context manager."""

    def __init__(self, engine: Engine, *, places: int) -> None:
        """
        Args:
            places: completions that may run and wait together.
        """
        self._engine, self.places = engine, places
        self.failure: str | None = None
        """The error that the engine failed with, after which it serves no requests; None while it works."""
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._outlets: set[Outlet] = set()
        self._by_key: dict[str | int, Outlet] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.accepts = True
        """Whether new requests are accepted."""

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all completions, and the thread after its current forward pass."""
        self.accepts = False
        self._tell_all(Ended("the server ended before the completion did"))
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    @property
    def statistics(self) -> Statistics:
        """Statistics of the engine at this moment."""
        return self._engine.statistics

    @property
    def longest(self) -> int:
        """The most tokens that prompt and completion together may have."""
        return self._engine.longest

    @property
    def is_idle(self) -> bool:
        """Whether no request is open."""
        return not self._outlets

    @property
    def open(self) -> int:
        """Number of completions that run or wait."""
        return sum(len(outlet.open) for outlet in self._outlets)

    @asynccontextmanager
    async def completions(self, requests: Sequence[Request]) -> AsyncIterator[AsyncIterator[Given]]:
        """Submit requests and iterate over their outputs; what is open when the context is left is cancelled.

        Raises:
            Busy: when `places` has no room for all of them.
            Ended, EngineFailed: also while outputs are read, as are CompletionFailed and what `Engine.add` raises.
        """
        if self.failure:
            raise EngineFailed(self.failure)
        if not self.accepts:
            raise Ended("the server is about to end: ask another, or later")
        if self.open + len(requests) > self.places:
            raise Busy(f"{self.open} completions run or wait, and {self.places} may: try again later")
        outlet = Outlet({request.key for request in requests})
        self._outlets.add(outlet)
        self._inbox.put(partial(self._add, requests, outlet))
        try:
            yield outlet.outputs()
        finally:
            self._outlets.remove(outlet)
            self._inbox.put(partial(self._cancel, tuple(outlet.open)))

    def _tell_all(self, error: Exception) -> None:
        for outlet in self._outlets:
            outlet.put(error)

    def _failed(self, reason: str) -> None:
        self.failure = f"the engine failed: {reason}"
        self._tell_all(EngineFailed(self.failure))

    def _run(self) -> None:
        try:
            while (commands := self._commands()) is not None:
                for command in commands:
                    command()
                if self._engine.has_work:
                    self._hand_out(self._engine.step())
            self._cancel(tuple(self._by_key))
        except Exception as error:
            log.exception("the engine failed")
            self._loop.call_soon_threadsafe(self._failed, f"{type(error).__name__}: {error}")

    def _commands(self) -> list[Command] | None:
        """The queued commands; waits for one where the engine has no work. None once the server is closed."""
        found: list[Command] = []
        wait = not self._engine.has_work
        while True:
            try:
                command = self._inbox.get(block=wait and not found)
            except queue.Empty:
                return found
            if command is None:
                return None
            found.append(command)

    def _add(self, requests: Sequence[Request], outlet: Outlet) -> None:
        try:
            for request in requests:
                self._engine.add(request)
                self._by_key[request.key] = outlet
        except Exception as error:
            self._cancel([request.key for request in requests])
            self._loop.call_soon_threadsafe(outlet.put, error)

    def _cancel(self, keys: Sequence[str | int]) -> None:
        for key in keys:
            self._engine.cancel(key)
            self._by_key.pop(key, None)

    def _hand_out(self, outputs: Sequence[Output]) -> None:
        pairs = [(self._by_key[output.key], output) for output in outputs]
        for output in outputs:
            if output.finish_reason:
                del self._by_key[output.key]
        self._loop.call_soon_threadsafe(_put_all, pairs)


def _put_all(pairs: Sequence[tuple[Outlet, Output]]) -> None:
    for outlet, output in pairs:
        outlet.put(output)
