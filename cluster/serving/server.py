"""Runs the server on a bound socket until a signal, then lets open completions end for some seconds."""

import asyncio
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from lockstep.cluster.serving.app import Server
from lockstep.cluster.serving.async_engine import AsyncEngine
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.rollout.protocol import Engine

POLL_S = 0.05


@dataclass(frozen=True)
class Settings:
    """Settings of one server."""

    name: str
    """The name of the model in requests and responses."""
    api_key: str | None
    places: int
    """Number of completions that may run and wait."""
    grace: float
    """Seconds that open completions have to end after the first signal."""


def serve(
    engine: Engine, tokenizer: Tokenizer, listener: socket.socket, settings: Settings, say: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends at once."""
    asyncio.run(_served(engine, tokenizer, listener, settings, say))


async def _served(
    engine: Engine, tokenizer: Tokenizer, listener: socket.socket, settings: Settings, say: Callable[[str], None]
) -> None:
    asked, again = _signals()
    async with AsyncEngine(engine, places=settings.places) as service:
        server = Server(service, tokenizer, settings.name, settings.api_key)
        runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        site = web.SockSite(runner, listener)
        await site.start()
        say(f"{settings.name} is served at {site.name}/v1")
        await asked.wait()
        service.accepts = False
        await site.stop()
        if service.open:
            say(f"{service.open} completions have {settings.grace:g} s to end")
        await _until_idle(service, settings.grace, again)
        await service.close()
        await runner.cleanup()


async def _until_idle(service: AsyncEngine, grace: float, at_once: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace
    while not service.is_idle and loop.time() < deadline and not at_once.is_set():
        await asyncio.sleep(POLL_S)


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events that the first and the second SIGINT or SIGTERM set."""
    first, second = asyncio.Event(), asyncio.Event()

    def ask() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ask)
    return first, second
