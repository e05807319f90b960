"""An HTTP server on this machine that answers chat completions by a script, failures included."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any

from lockstep.rl.verifiers.llm_judge.config import LLMJudgeConfig


@dataclass(frozen=True)
class Step:
    """What one request is answered."""

    body: str = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = "answer"
    """`hang` for no answer until the server ends, `close` for the end of the connection."""


HANG, CLOSE = Step(kind="hang"), Step(kind="close")


def says(text: str, finish_reason: str = "stop") -> Step:
    """A completion with this text."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Step(json.dumps({"object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 10}}))


def refuses(status: int, message: str = "no", **headers: str) -> Step:
    """An error as OpenAI writes it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Step(json.dumps({"error": {"message": message}}), status, named)


@dataclass
class Scripted:
    """A server that takes the steps of its script in order, and the last one again and again."""

    script: list[Step]
    port: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests."""
    keys: list[str | None] = field(default_factory=list)
    """Their headers `Authorization`."""
    ended: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)
    end: Callable[[], None] = lambda: None
    """Ends the server; whoever asks it then finds nobody."""

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def config(self, **given: Any) -> LLMJudgeConfig:
        """A judge of this server."""
        return LLMJudgeConfig(**{"url": self.url, "model": "judge"} | given)

    def take(self, body: dict[str, Any], key: str | None) -> Step:
        """The next step, for a request."""
        with self.lock:
            self.asked.append(body)
            self.keys.append(key)
            return self.script.pop(0) if len(self.script) > 1 else self.script[0]


@contextmanager
def scripted(*script: Step) -> Iterator[Scripted]:
    """A server on a free port, which ends with the block."""
    state = Scripted(list(script))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            step = CLOSE if state.ended.is_set() else state.take(body, self.headers.get("Authorization"))
            if step.kind == "hang":
                state.ended.wait()
            if step.kind != "answer":
                self.close_connection = True
                return
            content = step.body.encode()
            self.send_response(step.status)
            for name, value in {**step.headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})

    def end() -> None:
        state.ended.set()
        server.shutdown()
        server.server_close()

    state.end = end
    thread.start()
    try:
        yield state
    finally:
        end()
        thread.join()
