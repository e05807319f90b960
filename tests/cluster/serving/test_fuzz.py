"""Bodies that nobody has thought of: each is answered, none with a 500, and the server is as it was before."""

import http.client
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cluster.cli_process import until
from tests.cluster.servers import MODEL, Running, idle

PATHS = "/v1/completions", "/v1/chat/completions"
ANSWERS = {200, 400, 404, 413, 415}

NUMBERS = st.one_of(
    st.sampled_from(
        [0, -0.0, 1, -1, 5e-324, 1e-300, 1e-40, 1e-9, 1e-3, 1e9, 1e38, 1e39, 1e308, math.nan, math.inf, -math.inf]
    ),
    st.integers(-(10**20), 10**20),
    st.integers(0, 4),
    st.floats(),
    st.floats(0, 2),
    st.just(10**4000),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "a", "<|im_end|>", "<|im_start|>", "\ufffd", "\x00", "{{ 7 * 7 }}", "{% raw %}", "12 + 34 ="]),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
TOKENS = st.lists(st.integers(-1, 302), max_size=40)
PARTS = st.fixed_dictionaries({}, optional={"type": st.just("text") | ANYTHING, "text": TEXTS | ANYTHING})
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | ANYTHING,
        "content": TEXTS | st.lists(PARTS, max_size=2) | ANYTHING,
        "name": ANYTHING,
        "tool_calls": ANYTHING,
    },
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(0, 3) | ANYTHING,
    "stream": st.booleans() | ANYTHING,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | ANYTHING,
    "min_tokens": st.integers(0, 5) | ANYTHING,
    "stop": TEXTS | st.lists(TEXTS, max_size=3) | ANYTHING,
    "stop_token_ids": TOKENS | ANYTHING,
    "seed": st.integers() | ANYTHING,
    "logit_bias": st.dictionaries(st.integers(-1, 302).map(str), NUMBERS, max_size=4) | ANYTHING,
    "logprobs": st.integers(0, 20) | st.booleans() | ANYTHING,
    "user": ANYTHING,
    **dict.fromkeys(
        ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
        NUMBERS | ANYTHING,
    ),
}
KINDS = {
    PATHS[0]: (
        {"prompt": TEXTS | TOKENS | st.lists(TEXTS, max_size=3) | st.lists(TOKENS, max_size=3) | ANYTHING},
        {"echo": st.booleans() | ANYTHING, "suffix": ANYTHING},
    ),
    PATHS[1]: (
        {"messages": st.lists(MESSAGES, max_size=3) | ANYTHING},
        {"top_logprobs": st.integers(0, 20) | ANYTHING, "tools": ANYTHING, "max_completion_tokens": ANYTHING},
    ),
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and a body: mostly a few odd fields of one that is right, now and then any JSON or no JSON at all."""
    path = draw(st.sampled_from(PATHS))
    needed, more = KINDS[path]
    model = st.just(MODEL) | st.just(MODEL) | ANYTHING
    limit = st.integers(0, 6) | st.integers(0, 6) | ANYTHING
    some = draw(st.lists(st.sampled_from([*FIELDS, *more]), max_size=4, unique=True))
    chosen = {name: (FIELDS | more)[name] for name in some}
    bodies = st.fixed_dictionaries({"model": model, "max_tokens": limit, **needed, **chosen})
    rare = draw(st.integers(0, 19))
    if rare == 0:
        return path, draw(st.binary(max_size=40))
    body = draw(ANYTHING if rare == 1 else bodies)
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    return path, text.encode(errors="surrogatepass")[: None if rare > 2 else draw(st.integers(0, len(text)))]


class Line:
    """A connection that stays open; the answer to each request has to come within seconds."""

    def __init__(self, server: Running) -> None:
        self._line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)

    def ask(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        """Status and body."""
        self._line.request("POST", path, body, {"Content-Type": "application/json"} | headers)
        reply = self._line.getresponse()
        return reply.status, reply.read()

    def close(self) -> None:
        self._line.close()


@pytest.fixture(scope="module")
def line(server: Running) -> Iterator[Line]:
    made = Line(server)
    yield made
    made.close()


def strict(text: bytes) -> Any:
    """JSON without NaN and infinities, which no other parser reads."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def check(status: int, text: bytes) -> None:
    """Every answer is one that a client can read."""
    assert status in ANSWERS, (status, text)
    if text.startswith(b"data: "):
        events = [e.removeprefix(b"data: ") for e in text.split(b"\n\n") if e]
        assert events.pop() == b"[DONE]", text
        assert all("choices" in strict(event) for event in events), text
    else:
        assert set(strict(text)) == (
            {"error"} if status != 200 else {"id", "object", "created", "model", "choices", "usage"}
        )


NORMAL = json.dumps(
    {"model": MODEL, "prompt": "State the", "max_tokens": 8, "seed": 1, "logit_bias": {"2": -100}, "logprobs": 1}
).encode()


def normal(line: Line) -> Any:
    status, text = line.ask(PATHS[0], NORMAL)
    assert status == 200
    return json.loads(text)["choices"]


def fuzz(server: Running, line: Line, count: int) -> None:
    before = normal(line)

    @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(requests())
    def answered(request: tuple[str, bytes]) -> None:
        check(*line.ask(*request))

    answered()
    until(lambda: idle(server), 30)
    now = normal(line)
    assert [c["text"] for c in now] == [c["text"] for c in before]
    assert now[0]["logprobs"]["token_logprobs"] == pytest.approx(before[0]["logprobs"]["token_logprobs"], abs=1e-5)
    until(lambda: idle(server), 30)


def test_odd_bodies_are_answered(server: Running, line: Line) -> None:
    fuzz(server, line, 250)


@pytest.mark.exhaustive
def test_thousands_of_odd_bodies_are_answered(server: Running, line: Line) -> None:
    fuzz(server, line, 6000)


LARGE = {
    "fields that nobody knows": {"x" * 3_000_000: 1},
    "messages that are none": {"messages": [1] * 1_500_000},
    "parts that are none": {"messages": [{"role": "user", "content": [1] * 1_500_000}]},
    "prompts without tokens": {"prompt": [""] * 900_000},
    "prompts that are too many": {"prompt": ["a"] * 700_000},
    "prompts of several kinds": {"prompt": ["a", *[1] * 1_000_000]},
    "biases that are none": {"prompt": "a", "logit_bias": {f"a{i}": 1 for i in range(50_000)}},
    "stop tokens": {"prompt": "a", "stop_token_ids": ["x"] * 800_000},
    "stop strings": {"prompt": "a", "stop": [1] * 1_500_000},
    "a long word": {"prompt": "a" * 300_000},
    "a long number": {"prompt": "a", "seed": 10**4299},
    "depth": {"prompt": "a", "user": json.loads("[" * 150 + "]" * 150)},
}


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE)
def test_large_bodies_are_answered_briefly(body: dict[str, Any], server: Running, line: Line) -> None:
    path = PATHS["messages" in body]
    status, text = line.ask(path, json.dumps({"model": MODEL, **body}).encode())
    check(status, text)
    assert len(text) < 1000
    assert idle(server)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "nonsense"])
def test_bodies_that_are_not_compressed_as_they_say(coding: str, server: Running) -> None:
    made = Line(server)
    status, _ = made.ask(PATHS[0], NORMAL, **{"Content-Encoding": coding})
    made.close()
    assert status in (200, 400, 415)
