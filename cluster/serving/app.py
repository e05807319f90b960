"""The aiohttp application: OpenAI's endpoints, /health and /metrics. Errors are JSON in OpenAI's format."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeVar

from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CONTENT_TYPE_LATEST

from lockstep.cluster.serving.async_engine import AsyncEngine, Busy, Ended, EngineFailed, Given
from lockstep.cluster.serving.engine_requests import EngineRequests, RequestMaker
from lockstep.cluster.serving.errors import Refused
from lockstep.cluster.serving.local_requests import check_local
from lockstep.cluster.serving.metrics import Metrics
from lockstep.cluster.serving.protocol import Body, ChatBody, CompletionBody
from lockstep.cluster.serving.responses import ChatReply, Choice, CompletionReply, Piece, Reply, Usage, merged
from lockstep.cluster.serving.structured.call_stream import CallStream
from lockstep.cluster.serving.structured.tools import ToolUse
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.rollout.detokenizer import Decode, TextStream
from lockstep.rl.rollout.grammar import GrammarCompiler
from lockstep.rl.rollout.output_processor import CompletionFailed
from lockstep.rl.rollout.protocol import PromptTooLong, TokenOutput

log = logging.getLogger(__name__)

LARGEST_BODY = 4 << 20
"""Bytes."""

HUNG_UP = 499
"""Status of a request whose client closed the connection, as nginx numbers it."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
AnyBody = TypeVar("AnyBody", bound=Body)


@dataclass(frozen=True)
class Server:
    """The state that all endpoints share, and the application made of them."""

    service: AsyncEngine
    tokenizer: Tokenizer
    name: str
    """Of the model."""
    api_key: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def app(self) -> web.Application:
        """The application with all endpoints and middlewares."""
        metrics = Metrics(lambda: self.service.statistics)
        app = web.Application(middlewares=[_measured(metrics), _errors, self._guarded], client_max_size=LARGEST_BODY)
        answers = Answers(self, metrics)
        app.add_routes(
            [
                web.post("/v1/completions", answers.completions),
                web.post("/v1/chat/completions", answers.chat),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name:.+}", self._model),
                web.get("/health", self._health),
                web.get("/metrics", _page(metrics)),
            ]
        )
        return app

    @cached_property
    def compiler(self) -> GrammarCompiler:
        """Compiles grammars over the tokenizer's tokens; made when it is first asked for."""
        return GrammarCompiler(self.tokenizer.tokenizer_json)

    def check_model(self, name: str) -> None:
        """Check that a model is the one that is served.

        Raises:
            Refused: when it is not.
        """
        if name != self.name:
            raise Refused(
                404, f"there is no model {name[:80]!r}: use {self.name!r}", param="model", code="model_not_found"
            )

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.api_key is None:
            check_local(request)
        elif request.path != "/health":
            given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
            if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
                raise Refused(401, "the header Authorization has to be 'Bearer' and the key", code="invalid_api_key")
        return await handler(request)

    @property
    def _card(self) -> dict[str, object]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "lockstep"}

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card]})

    async def _model(self, request: web.Request) -> web.Response:
        self.check_model(request.match_info["name"])
        return web.json_response(self._card)

    async def _health(self, _: web.Request) -> web.Response:
        failure = self.service.failure
        body = {"status": "failed", "reason": failure} if failure else {"status": "ok"}
        return web.json_response(body, status=503 if failure else 200)


@dataclass(frozen=True)
class Answers:
    """The endpoints for completions and chat completions."""

    server: Server
    metrics: Metrics

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Handle `POST /v1/completions`."""
        body = await self._body(request, CompletionBody)
        reply = CompletionReply(self.server.name, self.named, body.logprobs is not None, bool(body.logprobs))
        return await self._answer(request, body, reply, await asyncio.to_thread(self._maker.completion, body))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Handle `POST /v1/chat/completions`."""
        body = await self._body(request, ChatBody)
        reply = ChatReply(self.server.name, self.named, bool(body.logprobs))
        return await self._answer(request, body, reply, await asyncio.to_thread(self._maker.chat, body), body.tool_use)

    @property
    def named(self) -> Decode:
        """Decodes tokens for log-probabilities, where special tokens are shown by their names."""
        return partial(self.server.tokenizer.decode, skip_special=False)

    @property
    def _maker(self) -> RequestMaker:
        service = self.server.service
        return RequestMaker(self.server.tokenizer, service.longest, service.places, lambda: self.server.compiler)

    async def _body(self, request: web.Request, kind: type[AnyBody]) -> AnyBody:
        if request.content_type != "application/json":
            raise Refused(415, "the body has to be JSON: set the header Content-Type to application/json")
        try:
            raw = await request.read()
        except web.RequestPayloadError as error:
            raise Refused(400, "the body is not what Content-Encoding and Transfer-Encoding say: mend them") from error
        body = kind.read(raw)
        self.server.check_model(body.model)
        return body

    async def _answer(
        self, request: web.Request, body: Body, reply: Reply, job: EngineRequests, tools: ToolUse | None = None
    ) -> web.StreamResponse:
        began = time.monotonic()
        requests = job.requests(reply.id)
        async with self.server.service.completions(requests) as outputs:
            first = await anext(outputs)
            self.metrics.first_token_seconds.observe(time.monotonic() - began)
            answer = Answer(job, [r.key for r in requests], self.server.tokenizer, self.named, tools)
            pieces = answer.pieces(first, outputs)
            if body.stream:
                return await _streamed(request, reply, answer, pieces, with_usage=body.usage_in_stream)
            found: list[list[Piece]] = [[] for _ in requests]
            async for piece in pieces:
                found[piece.index].append(piece)
            return web.json_response(reply.whole([merged(choice) for choice in found], answer.usage))


class Answer:
    """Turns the outputs of one HTTP request into pieces of its choices, as they come."""

    def __init__(
        self,
        job: EngineRequests,
        keys: Sequence[str | int],
        tokenizer: Tokenizer,
        named: Decode,
        tools: ToolUse | None,
    ) -> None:
        befores = [echo for echo in job.echoes for _ in range(job.samples)] or [""] * len(keys)
        self._choices = {
            key: Choice(i, TextStream(tokenizer.decode, job.sampling.stop), named, before, CallStream.of(tools))
            for i, (key, before) in enumerate(zip(keys, befores, strict=True))
        }
        self._prompt_tokens = sum(map(len, job.prompts))
        self._tokens = 0

    @property
    def usage(self) -> Usage:
        """Tokens of the prompts and of what has been generated so far."""
        return Usage(self._prompt_tokens, self._tokens)

    async def pieces(self, first: Given, others: AsyncIterator[Given]) -> AsyncIterator[Piece]:
        """Pieces of all choices, each as soon as its text is certain."""
        output: Given | None = first
        while output is not None:
            self._tokens += isinstance(output, TokenOutput)
            piece = self._choices[output.key].add(output)
            if piece is not None:
                yield piece
            output = await anext(others, None)


async def _streamed(
    request: web.Request, reply: Reply, answer: Answer, pieces: AsyncIterator[Piece], *, with_usage: bool
) -> web.StreamResponse:
    """Stream the reply as server-sent events; an error becomes an event, since the status has been sent already."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        async for piece in pieces:
            await response.write(_event(reply.chunk(piece, None, with_usage=with_usage)))
        if with_usage:
            await response.write(_event(reply.chunk(None, answer.usage, with_usage=True)))
        await response.write(b"data: [DONE]\n\n")
    except ConnectionError:
        raise
    except Exception as error:
        await response.write(_event(_refusal(error).body))
    await response.write_eof()
    return response


def _event(data: object) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _refusal(error: Exception) -> Refused:
    """The response for an exception: status, code and a message."""
    match error:
        case Refused():
            return error
        case Busy():
            return Refused(429, str(error), code="rate_limit_exceeded")
        case Ended():
            return Refused(503, str(error), code="ended")
        case EngineFailed():
            return Refused(500, str(error), code="engine_failed")
        case CompletionFailed():
            return Refused(500, f"the completion failed: {error}", code="completion_failed")
        case PromptTooLong():
            return Refused(400, str(error), code="context_length_exceeded")
        case ValueError():
            return Refused(400, str(error))
        case web.HTTPRequestEntityTooLarge():
            return Refused(413, f"the body is too large: {LARGEST_BODY} bytes are allowed", code="body_too_large")
        case web.HTTPException():
            return Refused(error.status, error.reason)
        case _:
            log.error("a request failed", exc_info=error)
            return Refused(500, f"the server failed with {type(error).__name__}; its log says more")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ConnectionError:
        return web.Response(status=HUNG_UP)
    except Exception as error:
        refusal = _refusal(error)
        headers = {"Retry-After": "1"} if refusal.status in (429, 503) else {}
        if isinstance(error, web.HTTPMethodNotAllowed):
            headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        return web.json_response(refusal.body, status=refusal.status, headers=headers)


def _measured(metrics: Metrics) -> Middleware:
    @web.middleware
    async def measured(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        path = resource.canonical if resource else "unknown"
        began, status = time.monotonic(), HUNG_UP
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            metrics.requests.labels(path, status).inc()
            metrics.seconds.labels(path).observe(time.monotonic() - began)

    return measured


def _page(metrics: Metrics) -> Handler:
    async def page(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return page
