"""JSON of a schema and tool calls, as the official client asks for them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import Groups
from tests.cluster.servers import MODEL, Running, serving, serving_tools
from tests.data.template_shapes import SHAPES

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "東京"]}, "day": {"$ref": "#/$defs/day"}},
    "required": ["city", "day"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 7}},
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "plan", "schema": SCHEMA, "strict": True}}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "Forecast.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock", "parameters": NOTHING, "strict": True}},
]
ASKED: Any = [{"role": "user", "content": "What is it like?"}]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer, groups: Groups) -> Iterator[Running]:
    """It ends with the module."""
    with serving_tools(tokenizer, groups) as running:
        yield running


def check_plan(text: str | None) -> None:
    said = json.loads(text or "")
    assert list(said) == ["city", "day"]
    assert said["city"] in ("Oslo", "東京")
    assert 1 <= said["day"] <= 7


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"temperature": 1.8, "top_p": 0.8}], ids=str)
def test_answers_are_json_of_the_schema(client: OpenAI, sampling: dict[str, Any]) -> None:
    given: dict[str, Any] = dict(model=MODEL, response_format=FORMAT, seed=3, max_tokens=200, **sampling)
    whole = client.chat.completions.create(messages=ASKED, n=3, **given)
    for choice in whole.choices:
        check_plan(choice.message.content)
        assert choice.finish_reason == "stop"
    stream = client.chat.completions.create(messages=ASKED, stream=True, **given)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == whole.choices[0].message.content
    body = {key: given[key] for key in given if key != "response_format"}
    text = client.completions.create(prompt="12 +", extra_body={"response_format": FORMAT}, logprobs=1, **body)
    check_plan(text.choices[0].text)


def test_any_object_is_json(client: OpenAI) -> None:
    """What the limit on tokens cuts off is the begin of one."""
    asked: Any = dict(model=MODEL, messages=ASKED, response_format={"type": "json_object"}, max_tokens=80)
    for seed in range(4):
        [choice] = client.chat.completions.create(seed=seed, **asked).choices
        content = choice.message.content or ""
        assert content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(content), dict)


def check_call(call: Any) -> None:
    assert (call.type, call.id[:5]) == ("function", "call_")
    if call.function.name == "weather":
        check_plan(call.function.arguments)
    else:
        assert (call.function.name, call.function.arguments) == ("clock", "{}")


@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
def test_calls_that_have_to_be_made_are_made(client: OpenAI, tool_choice: Any) -> None:
    given: Any = dict(model=MODEL, messages=ASKED, tools=TOOLS, tool_choice=tool_choice, parallel_tool_calls=False)
    whole = client.chat.completions.create(n=6, seed=1, **given)
    names = set()
    for choice in whole.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        [call] = choice.message.tool_calls or ()
        check_call(call)
        names.add(call.function.name)
    assert names == ({"weather", "clock"} if tool_choice == "required" else {"weather"})
    found, reason = "", None
    for chunk in client.chat.completions.create(seed=1, stream=True, **given):
        [choice] = chunk.choices
        for part in choice.delta.tool_calls or ():
            assert (part.index, part.type) == (0, "function")
            found += part.function.arguments
        assert not choice.delta.content
        reason = choice.finish_reason or reason
    assert (found, reason) == (whole.choices[0].message.tool_calls[0].function.arguments, "tool_calls")


def test_several_calls_stand_in_one_answer(client: OpenAI) -> None:
    given: Any = dict(model=MODEL, messages=ASKED, tools=TOOLS, tool_choice="required", n=8, seed=2, max_tokens=400)
    counts = set()
    for choice in client.chat.completions.create(**given).choices:
        if choice.finish_reason == "tool_calls":
            calls = choice.message.tool_calls or []
            counts.add(len(calls))
            assert len({call.id for call in calls}) == len(calls)
            for call in calls:
                check_call(call)
    assert max(counts) > 1, "of eight answers none has several: the test has lost its point"


def test_nothing_is_forced_and_what_is_no_call_is_text(client: OpenAI) -> None:
    given: Any = dict(model=MODEL, messages=ASKED, tools=TOOLS, seed=4, max_tokens=12)
    auto, none = (client.chat.completions.create(tool_choice=c, **given).choices[0] for c in ("auto", "none"))
    assert auto.message.content == none.message.content
    assert auto.message.tool_calls is none.message.tool_calls is None


def test_calls_and_results_go_back_into_the_template(client: OpenAI) -> None:
    one: Any = dict(model=MODEL, tools=TOOLS, tool_choice=NAMED, parallel_tool_calls=False, seed=1)
    answer = client.chat.completions.create(messages=ASKED, **one).choices[0]
    [call] = answer.message.tool_calls or ()
    told = [*ASKED, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    given: Any = dict(model=MODEL, tools=TOOLS, seed=1, max_tokens=4)
    prompt = client.chat.completions.create(messages=told, **given).usage.prompt_tokens
    longer = [*told[:-1], told[-1] | {"content": "Rain. Rain."}]
    assert client.chat.completions.create(messages=longer, **given).usage.prompt_tokens > prompt
    broken = json.loads(answer.message.model_dump_json(exclude_none=True))
    broken["tool_calls"][0]["function"]["arguments"] = "[1]"
    with pytest.raises(BadRequestError, match="has to be a JSON object") as found:
        client.chat.completions.create(messages=[*ASKED, broken], **given)
    assert found.value.param == "messages.1.tool_calls.0.function.arguments"


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objct"}}}},
        "response_format.json_schema.schema",
        "Invalid type: objct",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        "response_format.json_schema.schema",
        "not",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema", ""),
    ({"tools": TOOLS, "response_format": FORMAT}, "response_format", "cannot both be"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "not among"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", ""),
]


@pytest.mark.parametrize(("given", "param", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_kept_to_is_refused(client: OpenAI, given: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequestError) as found:
        client.chat.completions.create(model=MODEL, messages=ASKED, **given)
    assert str(found.value.param).startswith(param)
    assert words in str(found.value)


def test_templates_of_another_form_are_refused(server: Running, tokenizer: Tokenizer) -> None:
    other = Tokenizer(tokenizer.files | {"chat_template.jinja": SHAPES["llama 3 with tools"]})
    with serving(server.engine, other) as running, pytest.raises(BadRequestError, match="in another form"):
        running.client().chat.completions.create(model=MODEL, messages=ASKED, tools=TOOLS)
