"""A server's life: a socket, an engine, and an end that lets streams finish for some seconds."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from lockstep.cluster.serving.app import Server
from lockstep.cluster.serving.service import EngineService
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.rollout.engine import RolloutEngine

API_KEY = "LOCKSTEP_API_KEY"
"""The environment variable for a key that should not be seen in a list of processes."""

POLL_S = 0.05


@dataclass(frozen=True)
class Settings:
    """How to serve."""

    name: str
    """Of the model, as clients call it."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    sequences: int = 64
    """Completions that run at the same time."""
    waiting: int = 512
    """Completions that may wait beside them."""
    grace: float = 10.0
    """Seconds that completions have to end when the server is asked to."""


def is_local(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(settings: Settings) -> socket.socket:
    """A socket that nobody else can have, before a model is loaded for it.

    Raises:
        ValueError: when others could reach it without a key.
        OSError: when the port is taken or the host is not this machine's.
    """
    host, port = settings.host, settings.port
    if not settings.api_key and not is_local(host):
        raise ValueError(
            f"--host {host} lets other machines in, and there is no key: give --api-key or set {API_KEY}, "
            "or leave out --host"
        )
    found = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        if found is not None:
            found.close()
        raise OSError(f"{host}:{port} cannot be served: {error.strerror or error}") from error
    return found


def serve(
    engine: RolloutEngine, tokenizer: Tokenizer, door: socket.socket, settings: Settings, say: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends at once."""
    asyncio.run(_served(engine, tokenizer, door, settings, say))


async def _served(
    engine: RolloutEngine, tokenizer: Tokenizer, door: socket.socket, settings: Settings, say: Callable[[str], None]
) -> None:
    asked, again = _signals()
    async with EngineService(engine, places=settings.sequences + settings.waiting) as service:
        server = Server(service, tokenizer, settings.name, settings.api_key)
        runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        site = web.SockSite(runner, door)
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


async def _until_idle(service: EngineService, grace: float, at_once: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace
    while service.open and loop.time() < deadline and not at_once.is_set():
        await asyncio.sleep(POLL_S)


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events for the first and the second signal to end."""
    first, second = asyncio.Event(), asyncio.Event()

    def ask() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ask)
    return first, second
