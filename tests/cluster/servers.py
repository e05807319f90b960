"""A server of a tiny model on a free port, in a thread of the tests' process."""

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from openai import OpenAI

from lockstep.cluster.serving.app import Server
from lockstep.cluster.serving.async_engine import AsyncEngine
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import Groups
from lockstep.rl.rollout.engine import RolloutEngine
from tests.data.template_shapes import SHAPES
from tests.model.random_transformer import random_transformer

MODEL = "tiny"


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    engine: RolloutEngine
    port: int

    @property
    def url(self) -> str:
        """Of everything."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none") -> OpenAI:
        """The official client; it tries nothing twice."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def serving(
    engine: RolloutEngine, tokenizer: Tokenizer, *, places: int = 512, api_key: str | None = None
) -> Iterator[Running]:
    """A server that ends with the context."""
    loop, ready, end = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    ports: list[int] = []

    async def serve() -> None:
        async with AsyncEngine(engine, places=places) as service:
            app = Server(service, tokenizer, MODEL, api_key).app()
            runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            ports.append(runner.addresses[0][1])
            ready.set()
            await end.wait()
            await service.close()
            await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(30)
    try:
        yield Running(engine, ports[0])
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"
        loop.close()


@contextmanager
def serving_tools(tokenizer: Tokenizer, groups: Groups) -> Iterator[Running]:
    """A server of a random model with room for a chat template of tools."""
    with_tools = Tokenizer(tokenizer.files | {"chat_template.jinja": SHAPES["qwen 2.5 with tools"]})
    made = random_transformer(groups, vocabulary=tokenizer.numbers, context=4096)
    with serving(RolloutEngine(made, decode=tokenizer.decode, special=tokenizer.special), with_tools) as running:
        yield running


def post(server: Running, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers, whatever they are."""
    headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    request = urllib.request.Request(f"{server.url}{path}", data=body, headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply), dict(reply.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), dict(error.headers)


def get(server: Running, path: str) -> tuple[int, str]:
    """Status and text."""
    try:
        with urllib.request.urlopen(f"{server.url}{path}", timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def idle(server: Running) -> bool:
    """Whether nothing runs or waits, and no block is held."""
    now = server.engine.statistics
    return now.running == now.waiting == now.blocks_used == 0
