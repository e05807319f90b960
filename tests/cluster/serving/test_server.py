"""The server against the engine behind it, through the official client; and against clients that behave badly."""

import asyncio
import json
import math
import signal
import socket
import struct
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from lockstep.data.tokenizer import Tokenizer
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.protocol import Request, TokenOutput
from tests.cluster.cli_process import Command, refused, until
from tests.cluster.servers import MODEL, Running, get, idle, post, serving

PROMPT = "State the final answer"
ENDLESS = {"2": -100.0}
"""A bias with which the tiny model never ends by itself."""


def drawn(
    transformer: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: SamplingParams,
    seed: int,
    sample: int = 0,
) -> list[TokenOutput]:
    """What an engine of its own draws."""
    engine = RolloutEngine(transformer, decode=tokenizer.decode)
    engine.add(Request("it", tuple(tokenizer.encode(prompt)), sampling, seed, sample))
    found = []
    while engine.has_work:
        found += engine.step()
    return found


def test_a_completion_is_what_the_engine_draws(client: OpenAI, transformer: Transformer, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0.8, top_p=0.9, seed=5, n=3, extra_body={"top_k": 40}
    )
    sampling = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, max_new_tokens=20)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    total = 0
    for choice in answer.choices:
        tokens = drawn(transformer, tokenizer, PROMPT, sampling, 5, choice.index)
        assert choice.text == tokenizer.decode([t.token for t in tokens])
        assert choice.finish_reason == tokens[-1].finish_reason
        total += len(tokens)
    assert len({choice.text for choice in answer.choices}) == 3
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokenizer.encode(PROMPT)), total)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + total


def test_seeds_make_answers_come_again(client: OpenAI) -> None:
    def text(**options: Any) -> str:
        return client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, **options).choices[0].text

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text()
    assert text(temperature=0) == text(temperature=0, seed=4) == text(extra_body={"top_k": 1})


@pytest.mark.parametrize("stop", [None, ["1", "e"], "ab"])
def test_streams_say_the_same_as_whole_answers(client: OpenAI, stop: Any) -> None:
    asked: dict[str, Any] = dict(
        model=MODEL, max_tokens=40, temperature=1.3, seed=3, n=3, stop=stop, logit_bias=ENDLESS
    )
    completion = client.completions.create(prompt=[PROMPT, "12 + "], logprobs=2, **asked)
    texts, tokens, reasons = ([""] * 6, [[] for _ in range(6)], [None] * 6)
    for chunk in client.completions.create(prompt=[PROMPT, "12 + "], logprobs=2, stream=True, **asked):
        for c in chunk.choices:
            assert reasons[c.index] is None
            texts[c.index] += c.text
            tokens[c.index] += c.logprobs.tokens
            reasons[c.index] = c.finish_reason
    assert texts == [c.text for c in completion.choices]
    assert tokens == [c.logprobs.tokens for c in completion.choices]
    assert reasons == [c.finish_reason for c in completion.choices]

    messages: Any = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(messages=messages, logprobs=True, **asked)
    said, roles, usage = [""] * 3, [[] for _ in range(3)], None
    logprobs: list[list[Any]] = [[] for _ in range(3)]
    options: Any = {"include_usage": True}
    for event in client.chat.completions.create(
        messages=messages, logprobs=True, stream=True, stream_options=options, **asked
    ):
        usage = event.usage
        for c in event.choices:
            said[c.index] += c.delta.content
            roles[c.index].append(c.delta.role)
            logprobs[c.index] += c.logprobs.content
    assert said == [c.message.content for c in chat.choices]
    for streamed, choice in zip(logprobs, chat.choices, strict=True):
        assert [t.token for t in streamed] == [t.token for t in choice.logprobs.content]
        assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in choice.logprobs.content], abs=1e-4)
    assert all(each[0] == "assistant" and not any(each[1:]) for each in roles)
    assert usage == chat.usage


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(client: OpenAI) -> None:
    asked: dict[str, Any] = dict(model=MODEL, prompt=PROMPT, max_tokens=60, seed=7, logit_bias=ENDLESS)
    whole = client.completions.create(**asked).choices[0]
    assert whole.finish_reason == "length"
    clean = whole.text.split("\ufffd")
    stop = max(clean, key=len)[-3:]
    assert len(stop) >= 2
    cut = client.completions.create(stop=["never", stop], **asked).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_log_probabilities_are_the_engines(client: OpenAI, transformer: Transformer, tokenizer: Tokenizer) -> None:
    sampling = SamplingParams(temperature=0.7, max_new_tokens=12, logprobs=4)
    asked: dict[str, Any] = dict(model=MODEL, max_tokens=12, temperature=0.7, seed=2)
    tokens = drawn(transformer, tokenizer, PROMPT, sampling, 2)
    found = client.completions.create(prompt=PROMPT, logprobs=4, **asked).choices[0].logprobs
    assert found.token_logprobs == pytest.approx([t.logp for t in tokens], abs=1e-4)
    assert found.tokens == [tokenizer.decode([t.token], skip_special=False) for t in tokens]
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)
    for top, name, token in zip(found.top_logprobs, found.tokens, tokens, strict=True):
        assert {tokenizer.decode([t], skip_special=False) for t, _ in token.top} | {name} == set(top)
        assert max(top.values()) == pytest.approx(token.top[0][1], abs=1e-4)
    plain = client.completions.create(prompt=PROMPT, logprobs=0, **asked).choices[0].logprobs
    assert (plain.token_logprobs, plain.top_logprobs) == (found.token_logprobs, None)

    messages: Any = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=3, **asked).choices[0]
    tokens = drawn(transformer, tokenizer, tokenizer.chat(messages), sampling, 2)
    assert [c.logprob for c in chat.logprobs.content] == pytest.approx([t.logp for t in tokens], abs=1e-4)
    for entry in chat.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert [t.logprob for t in entry.top_logprobs] == sorted((t.logprob for t in entry.top_logprobs), reverse=True)
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    assert client.chat.completions.create(messages=messages, **asked).choices[0].logprobs is None


def test_a_chat_is_the_template_and_its_turns_are_cached(server: Running, client: OpenAI, tokenizer: Tokenizer) -> None:
    messages: Any = [{"role": "system", "content": "final"}, {"role": "user", "content": "12 + 34 ="}]
    asked: dict[str, Any] = dict(model=MODEL, temperature=0)
    first = client.chat.completions.create(messages=messages, max_completion_tokens=16, **asked).choices[0].message
    prompt = tokenizer.chat(messages)
    assert first.content == client.completions.create(prompt=prompt, max_tokens=16, **asked).choices[0].text
    assert first.role == "assistant"
    before = server.engine.statistics.cached_prompt_tokens
    messages += [first.model_dump(), {"role": "user", "content": [{"type": "text", "text": "answer"}]}]
    client.chat.completions.create(messages=messages, max_tokens=4, **asked)
    assert server.engine.statistics.cached_prompt_tokens - before >= len(tokenizer.encode(prompt)) // 16 * 16
    filled = client.chat.completions.create(messages=messages[:2], logit_bias=ENDLESS, **asked)
    assert filled.usage is not None
    assert filled.usage.total_tokens == 256, "without a limit an answer may fill the context"
    assert filled.choices[0].finish_reason == "length"


def test_options_reach_the_engine(client: OpenAI, tokenizer: Tokenizer) -> None:
    def create(**options: Any) -> Any:
        return client.completions.create(**{"model": MODEL, "prompt": PROMPT, "max_tokens": 6, **options}).choices[0]

    bias = {str(tokenizer.encode("=")[0]): 100}
    assert create(logit_bias=bias).text == "======"
    assert create(logit_bias={"2": 100}).text == ""
    assert create(logit_bias={"2": 100}).finish_reason == "stop"
    assert len(create(logit_bias={"2": 100}, logprobs=0, extra_body={"min_tokens": 4}).logprobs.tokens) == 5
    assert create(logit_bias=bias, extra_body={"repetition_penalty": 1e9}, presence_penalty=2).text.startswith("=")
    assert create(temperature=1.5, seed=1, extra_body={"min_p": 1.0}).text == create(temperature=0).text
    assert create(echo=True, temperature=0).text == PROMPT + create(temperature=0).text
    assert create(prompt=tokenizer.encode(PROMPT), temperature=0).text == create(temperature=0).text
    assert create(user="me", extra_body={"store": False, "response_format": {"type": "text"}}).text


def test_models_and_health(server: Running, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        client.models.retrieve("other/model")
    assert get(server, "/health") == (200, '{"status": "ok"}')
    status, body = get(server, "/v1/nothing")
    assert (status, json.loads(body)["error"]["type"]) == (404, "invalid_request_error")
    assert get(server, "/v1/completions")[0] == 405


def test_metrics_can_be_read(server: Running, client: OpenAI) -> None:
    def samples() -> dict[Any, float]:
        families = text_string_to_metric_families(get(server, "/metrics")[1])
        return {(s.name, s.labels.get("path"), s.labels.get("status")): s.value for f in families for s in f.samples}

    before = samples()
    usage = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=9, logit_bias=ENDLESS).usage
    post(server, "/v1/completions", b"{")
    after = samples()
    assert usage is not None
    changes = {key: after[key] - before.get(key, 0) for key in after}
    assert changes["lockstep_generated_tokens_total", None, None] == usage.completion_tokens == 9
    assert changes["lockstep_prompt_tokens_total", None, None] == usage.prompt_tokens
    assert changes["lockstep_requests_total", "/v1/completions", "200"] == 1
    assert changes["lockstep_requests_total", "/v1/completions", "400"] == 1
    assert changes["lockstep_first_token_seconds_count", None, None] == 1
    assert after["lockstep_blocks_used", None, None] == after["lockstep_running", None, None] == 0


WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "gpt-9"}, 404, "model", "there is no model 'gpt-9'"),
    ({"model": None}, 400, "model", "string"),
    ({"prompt": ...}, 400, "prompt", "missing"),
    ({"prompt": ""}, 400, "prompt", "no tokens"),
    ({"prompt": []}, 400, "prompt", "list of tokens"),
    ({"prompt": [1, "a"]}, 400, "prompt", "list of tokens"),
    ({"prompt": [-1], "echo": True}, 400, "prompt", "list of tokens"),
    ({"prompt": [10**9]}, 400, None, "there is no token 1000000000"),
    ({"prompt": "a b" * 300}, 400, "prompt", "may have 256"),
    ({"prompt": "a", "max_tokens": 256}, 400, None, "256"),
    ({"max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
    ({"max_tokens": 10**4299}, 400, "max_tokens", "less than or equal to"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "integer"),
    ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, 400, "temperature", "number"),
    ({"temperature": math.inf}, 400, "temperature", "finite"),
    ({"temperature": math.nan}, 400, "temperature", "finite"),
    ({"temperature": 1e-300}, 400, "temperature", "use 0, which takes the likeliest token, or 0.001 and more"),
    ({"temperature": 1e-40}, 400, "temperature", "use 0"),
    ({"temperature": 1e30}, 400, "temperature", "less than or equal to"),
    ({"temperature": True}, 400, "temperature", "number"),
    ({"repetition_penalty": 1e-40}, 400, "repetition_penalty", "greater than or equal to"),
    ({"repetition_penalty": 5e-324}, 400, "repetition_penalty", "greater than or equal to"),
    ({"repetition_penalty": 1e39}, 400, "repetition_penalty", "less than or equal to"),
    ({"min_p": math.nan}, 400, "min_p", "less than or equal to 1"),
    ({"min_tokens": 10**30}, 400, "min_tokens", "less than or equal to"),
    ({"top_p": 0}, 400, "top_p", "greater than 0"),
    ({"top_k": -2}, 400, "top_k", "greater than or equal to 0"),
    ({"n": 0}, 400, "n", "greater than or equal to 1"),
    ({"n": 129}, 400, "n", "less than or equal to 128"),
    ({"n": 128, "prompt": ["a"] * 5}, 400, "n", "are too many"),
    ({"seed": "x"}, 400, "seed", "integer"),
    ({"stream": "yes"}, 400, "stream", "boolean"),
    ({"stop": ["x"] * 17}, 400, "stop", "at most 16"),
    ({"stop": ""}, 400, "stop.0", "at least 1 character"),
    ({"stop": 5}, 400, "stop", "array"),
    ({"logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
    ({"stop_token_ids": [2, 301]}, 400, None, "there is no token 301"),
    ({"stop_token_ids": [-1]}, 400, None, "there is no token -1"),
    ({"stop_token_ids": 2}, 400, "stop_token_ids", "array"),
    ({"stop_token_ids": [True]}, 400, "stop_token_ids.0", "integer"),
    ({"stop_token_ids": list(range(129))}, 400, "stop_token_ids", "at most 128"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias.x.[key]", "integer"),
    ({"logit_bias": {"999999": 1}}, 400, None, "there is no token 999999"),
    ({"presence_penalty": 3}, 400, "presence_penalty", "less than or equal to 2"),
    ({"temprature": 1}, 400, "temprature", "the nearest is temperature"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "no field"),
    ({"response_format": {"type": "json"}}, 400, "response_format.type", "'json_object'"),
    ({"response_format": {"type": "json_object"}, "min_tokens": 3}, 400, "min_tokens", "leave one out"),
    ({"best_of": 2}, 400, "best_of", "not supported"),
]
TURN = {"role": "user", "content": "a"}
WRONG_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hello"}, "messages", "array"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role", "'user'"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    ({"messages": [TURN, {"role": "user", "content": None}]}, "messages.1.content", "missing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "'text'"),
    ({"messages": [TURN | {"tool_calls": [{}]}]}, "messages.0.tool_calls.0.id", "missing"),
    ({"messages": [{"role": "user", "content": "a b" * 300}]}, "messages", "may have 256"),
    ({"messages": [TURN], "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"messages": [TURN], "response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    ({"messages": [TURN], "tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"messages": [TURN], "tool_choice": "always"}, "tool_choice", '"required"'),
    ({"messages": [TURN], "tools": [{"type": "function"}]}, "tools.0.function", "missing"),
    ({"messages": [TURN], "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "does not show tools"),
]


def check_refusal(found: tuple[int, dict[str, Any], Any], status: int, param: str | None, words: str) -> None:
    assert found[0] == status, found
    error = found[1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize("stream", [False, True])
def test_malformed_requests_are_refused(server: Running, stream: bool) -> None:
    for changes, status, param, words in WRONG:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2, "stream": stream, **changes}
        raw = json.dumps({k: v for k, v in body.items() if v is not ...}).encode()
        check_refusal(post(server, "/v1/completions", raw), status, param, words)
    for changes, param, words in WRONG_CHATS:
        raw = json.dumps({"model": MODEL, "max_tokens": 2, "stream": stream, **changes}).encode()
        check_refusal(post(server, "/v1/chat/completions", raw), 400, param, words)
    assert idle(server)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bodies_that_are_none_are_refused(server: Running, path: str) -> None:
    for raw in (b"", b"{", b"\xff\xfe", b'{"model": "tiny", ', b"[" * 100_000):
        check_refusal(post(server, path, raw), 400, None, "the body is not JSON")
    for raw in (b"[]", b"3", b"null", b'"tiny"'):
        check_refusal(post(server, path, raw), 400, None, "the body=")
    check_refusal(post(server, path, b"{}", Content_Type="text/plain"), 415, None, "application/json")
    large = json.dumps({"model": MODEL, "prompt": "a" * 10_000_000}).encode()
    check_refusal(post(server, path, large), 413, None, "4194304 bytes")
    assert get(server, "/health")[0] == 200


def test_64_clients_at_once_get_what_each_would_get_alone(server: Running, client: OpenAI) -> None:
    asked: dict[str, Any] = dict(model=MODEL, max_tokens=24, temperature=1.1, logit_bias=ENDLESS)
    prompts = [f"{PROMPT} {i} + {i * i} =" for i in range(64)]

    async def ask(shared: AsyncOpenAI, i: int) -> str:
        if i % 2:
            return (await shared.completions.create(prompt=prompts[i], seed=i, **asked)).choices[0].text
        stream = await shared.completions.create(prompt=prompts[i], seed=i, stream=True, **asked)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as shared:
            return await asyncio.gather(*(ask(shared, i) for i in range(64)))

    together = asyncio.run(ask_all())
    for i in range(0, 64, 7):
        assert together[i] == client.completions.create(prompt=prompts[i], seed=i, **asked).choices[0].text
    assert len(set(together)) == 64
    assert idle(server)


def hang_up(server: Running, body: dict[str, Any], wait_for: bytes) -> None:
    """Ask, read up to some bytes, and leave with a reset."""
    raw = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as line:
        head = (
            "POST /v1/completions HTTP/1.1",
            f"Host: 127.0.0.1:{server.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(raw)}",
        )
        line.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + raw)
        line.settimeout(30)
        read = b""
        while wait_for not in read:
            read += line.recv(4096)
            assert b" 200 OK" in read, read
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", len(raw) % 2, 0))


def test_clients_that_hang_up_leave_nothing_behind(server: Running, client: OpenAI) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 220, "logit_bias": ENDLESS}
    before = server.engine.statistics.generated_tokens
    for i in range(24):
        many = body | {"prompt": f"{PROMPT} {'=' * i}", "n": 1 + i % 3}
        hang_up(server, many | {"stream": True}, b"data: ")
        hang_up(server, many, b"")
    until(lambda: idle(server), 30)
    assert server.engine.statistics.generated_tokens - before < 24 * 2 * 220, "they were computed to their end"
    assert len(client.completions.create(**body, logprobs=0).choices[0].logprobs.tokens) == 220
    assert '"/v1/completions",status="499"' in get(server, "/metrics")[1]


def test_more_than_may_wait_are_told_to_come_again(transformer: Transformer, tokenizer: Tokenizer) -> None:
    engine = RolloutEngine(transformer, EngineConfig(sequences=1), decode=tokenizer.decode)
    with serving(engine, tokenizer, places=3) as server:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 200, "logit_bias": ENDLESS}
        stream = server.client().completions.create(**body, n=3, stream=True)
        next(iter(stream))
        status, reply, headers = post(server, "/v1/completions", json.dumps(body).encode())
        assert (status, reply["error"]["code"], headers["Retry-After"]) == (429, "rate_limit_exceeded", "1")
        with pytest.raises(openai.RateLimitError, match="3 completions run or wait, and 3 may"):
            server.client().completions.create(**body)
        stream.close()
        until(lambda: idle(server), 30)
        assert server.client().completions.create(**(body | {"max_tokens": 2})).choices[0].finish_reason == "length"


def test_an_engine_that_fails_fails_its_requests_and_says_so(transformer: Transformer, tokenizer: Tokenizer) -> None:
    with serving(RolloutEngine(transformer, decode=tokenizer.decode), tokenizer) as server:
        client = server.client()
        asked: dict[str, Any] = dict(model=MODEL, prompt=PROMPT, max_tokens=240, logit_bias=ENDLESS)
        stream = client.completions.create(**asked, stream=True)
        next(iter(stream))

        def fail(*_: object) -> None:
            raise RuntimeError("the device is gone")

        handle = transformer.register_forward_pre_hook(fail)
        try:
            with pytest.raises(openai.APIError, match="the engine failed: RuntimeError: the device is gone"):
                for _ in stream:
                    pass
            with pytest.raises(openai.InternalServerError, match="the device is gone"):
                client.completions.create(**asked)
            status, body = get(server, "/health")
            assert (status, json.loads(body)["status"]) == (503, "failed")
        finally:
            handle.remove()


def test_a_completion_that_fails_costs_no_other(transformer: Transformer, tokenizer: Tokenizer) -> None:
    def decode(tokens: list[int]) -> str:
        if 9 in tokens:
            raise UnicodeError("nine is no letter")
        return tokenizer.decode(tokens)

    fails: dict[str, Any] = dict(model=MODEL, prompt="12", max_tokens=9, stop="never", logit_bias={"9": 100})
    asked: dict[str, Any] = dict(model=MODEL, prompt=PROMPT, max_tokens=200, seed=1, logit_bias=ENDLESS | {"9": -100})
    with serving(RolloutEngine(transformer, decode=decode), tokenizer) as server:
        client = server.client()
        expected = client.completions.create(**asked).choices[0].text
        chunks = iter(client.completions.create(**asked, stream=True))
        found = next(chunks).choices[0].text
        for options in ({}, {"n": 3}, {"prompt": ["a", "b"]}, {"echo": True, "logprobs": 1}):
            with pytest.raises(openai.InternalServerError, match="the completion failed: nine is no letter") as error:
                client.completions.create(**fails | options)
            assert error.value.code == "completion_failed"
            with pytest.raises(openai.APIError, match="nine is no letter"):
                list(client.completions.create(**fails | options, stream=True))
        assert found + "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert get(server, "/health")[0] == 200
        until(lambda: idle(server), 30)


def test_a_pass_that_fails_costs_only_who_fails_again_alone(transformer: Transformer, tokenizer: Tokenizer) -> None:
    [nine] = tokenizer.encode("9")

    def refuse(module: Transformer, args: tuple[Any, ...]) -> None:
        if (args[0] == nine).any():
            raise RuntimeError("there is no kernel for nine")

    fails: dict[str, Any] = dict(model=MODEL, prompt="12 9", max_tokens=9)
    asked: dict[str, Any] = dict(
        model=MODEL, prompt=PROMPT, max_tokens=200, seed=1, logit_bias=ENDLESS | {str(nine): -100}
    )
    handle = transformer.register_forward_pre_hook(refuse)
    try:
        with serving(RolloutEngine(transformer, decode=tokenizer.decode), tokenizer) as server:
            client = server.client()
            expected = client.completions.create(**asked).choices[0].text
            chunks = iter(client.completions.create(**asked, stream=True))
            found = next(chunks).choices[0].text
            for options in ({}, {"n": 3}, {"prompt": ["a", "9"]}, {"echo": True, "logprobs": 1}):
                with pytest.raises(openai.InternalServerError, match="failed: there is no kernel for nine") as error:
                    client.completions.create(**fails | options)
                assert error.value.code == "completion_failed"
                with pytest.raises(openai.APIError, match="no kernel for nine"):
                    list(client.completions.create(**fails | options, stream=True))
            assert found + "".join(chunk.choices[0].text for chunk in chunks) == expected
            assert client.completions.create(**asked).choices[0].text == expected
            assert get(server, "/health")[0] == 200
            until(lambda: idle(server), 30)
    finally:
        handle.remove()


def test_what_is_not_done_when_the_server_ends_is_told_so(transformer: Transformer, tokenizer: Tokenizer) -> None:
    engine = RolloutEngine(transformer, decode=tokenizer.decode)
    with serving(engine, tokenizer) as server:
        asked: dict[str, Any] = dict(model=MODEL, prompt=PROMPT, max_tokens=240, logit_bias=ENDLESS, n=8)
        chunks = iter(server.client().completions.create(**asked, stream=True))
        next(chunks)
    with pytest.raises(openai.APIError, match="the server ended before the completion did"):
        list(chunks)
    assert not engine.has_work
    assert engine.statistics.blocks_used == 0


def test_a_key_is_asked_for(transformer: Transformer, tokenizer: Tokenizer) -> None:
    with serving(RolloutEngine(transformer, decode=tokenizer.decode), tokenizer, api_key="s3cret") as server:
        assert server.client("s3cret").models.list().data[0].id == MODEL
        for key in ("s3cre", "s3cret2", "sécret"):
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                server.client(key).models.list()
        assert post(server, "/v1/completions", b"{}")[0] == 401
        assert get(server, "/metrics")[0] == 401
        assert get(server, "/health")[0] == 200


def test_what_cannot_be_served_is_one_sentence(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCKSTEP_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert f"--host {host} lets other machines in" in refused("serve", str(tiny_folder), "--host", host)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"127.0.0.1:{port} cannot be served" in refused("serve", str(tiny_folder), "--port", port)


def test_a_signal_lets_streams_end_and_then_the_process(tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--port", "0", "--dtype", "float32", "--name", MODEL]
    command = Command(tmp_path / "log", "serve", str(tiny_folder), *options, LOCKSTEP_API_KEY="s3cret")
    try:
        command.wait_for("is served at http://127.0.0.1:")
        port = int(command.output.split("127.0.0.1:")[1].split("/")[0])
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="s3cret", max_retries=0)
        stream = client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=200,
            logit_bias=ENDLESS,
            stream=True,  # type: ignore[arg-type]
        )
        chunks = iter(stream)
        next(chunks)
        command.process.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        assert command.wait(60) == 0, command.output
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert "Traceback" not in command.output
    finally:
        command.kill()
