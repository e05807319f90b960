"""Which requests a server without a key answers: those to this machine's names, that no stranger's page sends."""

import http.client
import json

import pytest

from lockstep.cluster.serving.local_requests import is_local_origin, names_this
from lockstep.data.tokenizer import Tokenizer
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.engine import RolloutEngine
from tests.cluster.servers import Running, serving

LOCAL = ["localhost:8000", "LOCALHOST:8000", "LocalHost:8000", "127.0.0.1:8000", "127.3.2.1:8000", "[::1]:8000"]
STRANGE = [
    "evil.example:8000",
    "localhost.evil.example:8000",
    "127.0.0.1.evil.example:8000",
    "localhost:8001",
    "localhost",
    "127.0.0.1",
    "[::1]",
    "::1:8000",
    "[::1:8000",
    "0.0.0.0:8000",
    "[::]:8000",
    "10.0.0.7:8000",
    "localhost:",
    "localhost:8000:8000",
    "localhost:08000x",
    "localhost@evil.example:8000",
    "evil.example@localhost:8000",
    "localhost :8000",
    "localhost:8000/evil.example",
    "127.1:8000",
    "2130706433:8000",
    "",
    ":8000",
]


@pytest.mark.parametrize("host", LOCAL)
def test_names_of_this_machine(host: str) -> None:
    assert names_this(host, 8000)
    assert names_this(host.rpartition(":")[0], 80)


@pytest.mark.parametrize("host", STRANGE)
def test_other_names(host: str) -> None:
    assert not names_this(host, 8000)


@pytest.mark.parametrize(
    ("origin", "local"),
    [
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("http://[::1]:8000", True),
        ("HTTP://LOCALHOST:3000", True),
        ("null", False),
        ("", False),
        ("http://evil.example", False),
        ("http://localhost.evil.example:8000", False),
        ("http://localhost@evil.example", False),
        ("file://localhost", False),
        ("http://[::1", False),
    ],
)
def test_origins(origin: str, local: bool) -> None:
    assert is_local_origin(origin) == local


def asked(
    server: Running, *headers: tuple[str, str], path: str = "/v1/models"
) -> tuple[int, dict[str, dict[str, str]]]:
    """The answer to a request with these headers and no others."""
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    line.putrequest("GET", path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers:
        line.putheader(name, value)
    line.endheaders()
    reply = line.getresponse()
    body = reply.read()
    line.close()
    return reply.status, json.loads(body) if body.startswith(b"{") else {}


def test_a_server_without_a_key_answers_its_own_machine(server: Running) -> None:
    for host in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST"):
        assert asked(server, ("Host", f"{host}:{server.port}"))[0] == 200
    for path in ("/v1/models", "/health", "/metrics", "/v1/nothing"):
        status, body = asked(server, ("Host", f"evil.example:{server.port}"), path=path)
        assert (status, body["error"]["code"], body["error"]["type"]) == (403, "wrong_host", "invalid_request_error")
        assert f"the header Host is 'evil.example:{server.port}'" in body["error"]["message"]
        assert "give it a key with --api-key" in body["error"]["message"]
    assert asked(server, ("Host", "localhost"))[0] == asked(server, ("Host", f"localhost:{server.port + 1}"))[0] == 403
    assert asked(server)[0] in (400, 403)
    twice = ("Host", f"localhost:{server.port}"), ("Host", "evil.example")
    assert asked(server, *twice)[0] in (400, 403)


def test_pages_of_other_sites_may_not_ask(server: Running) -> None:
    host = "Host", f"localhost:{server.port}"
    assert asked(server, host, ("Origin", "http://localhost:3000"))[0] == 200
    for origin in ("http://evil.example", "null"):
        status, body = asked(server, host, ("Origin", origin))
        assert (status, body["error"]["code"]) == (403, "wrong_origin")


def test_with_a_key_any_name_will_do(transformer: Transformer, tokenizer: Tokenizer) -> None:
    with serving(RolloutEngine(transformer, decode=tokenizer.decode), tokenizer, api_key="s3cret") as server:
        key = "Authorization", "Bearer s3cret"
        for host in (f"box.example:{server.port}", "box.example"):
            assert asked(server, ("Host", host), key, ("Origin", "https://box.example"))[0] == 200
            assert asked(server, ("Host", host))[0] == 401
        assert asked(server, ("Host", "box.example"), ("Authorization", "Bearer s\xe9cret"))[0] == 401
