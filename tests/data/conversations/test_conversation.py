"""Rows of every shape give the same conversations, and what cannot be one is named with file, line and field."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.data.conversations.conversation import Conversation, read
from lockstep.data.row_reader import BadRow


def from_rows(tmp_path: Path, *rows: dict[str, Any]) -> list[Conversation]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read(str(path)))


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def told(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


TALK = [said("system", "s"), said("user", "q"), said("assistant", "a"), said("user", "r"), said("assistant", "b")]
SHAPES = {
    "messages": {"messages": TALK},
    "parts": {"messages": [said(m["role"], [{"type": "text", "text": m["content"]}]) for m in TALK]},
    "sharegpt": {
        "conversations": [
            told("system", "s"),
            told("human", "q"),
            told("gpt", "a"),
            told("user", "r"),
            told("GPT", "b"),
        ]
    },
    "sharegpt, a system field": {
        "system": "s",
        "conversations": [told("human", "q"), told("gpt", "a"), told("human", "r"), told("assistant", "b")],
    },
    "roles under conversations": {"conversations": TALK},
    "alpaca": {"instruction": "r", "input": "", "output": "b", "system": "s", "history": [["q", "a"]]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_conversation(shape: str, tmp_path: Path) -> None:
    [found] = from_rows(tmp_path, SHAPES[shape])
    assert list(found.messages) == TALK
    assert found.taught == (2, 4)
    assert found.place == f"{tmp_path}/rows.jsonl:1"
    assert not found.is_plain


def test_of_prompts_and_completions_the_completion_is_learned(tmp_path: Path) -> None:
    plain, chat, more = from_rows(
        tmp_path,
        {"prompt": "q", "completion": "a"},
        {"prompt": TALK[:4], "completion": [TALK[4]]},
        {"prompt": TALK[:2], "completion": TALK[2:]},
    )
    assert (plain.messages, plain.taught, plain.is_plain) == ((said("user", "q"), said("assistant", "a")), (1,), True)
    assert (list(chat.messages), chat.taught) == (TALK, (4,))
    assert (list(more.messages), more.taught) == (TALK, (2, 4))


def test_alpacas_input_stands_below_its_instruction(tmp_path: Path) -> None:
    [found] = from_rows(tmp_path, {"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert found.messages == (said("user", "Add.\n1, 2"), said("assistant", "3"))


def test_weights_and_first_messages_say_what_is_learned(tmp_path: Path) -> None:
    weighed = [said("assistant", "hi"), said("user", "q"), said("assistant", "a", weight=0), *TALK[3:]]
    [found] = from_rows(tmp_path, {"messages": weighed})
    assert found.taught == (4,)
    assert found.messages[2] == said("assistant", "a")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "call",
    [
        said("assistant", None, tool_calls=[CALL]),
        said("assistant", "", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]),
        {"role": "assistant", "tool_calls": [CALL | {"id": None}], "name": None},
        told("function_call", '{"name": "add", "arguments": {"a": 1}}'),
    ],
)
@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA])])
def test_calls_of_tools_have_arguments_that_are_objects(call: dict[str, Any], tools: Any, tmp_path: Path) -> None:
    rows = {"conversations": [told("human", "q"), call, told("observation", "1"), told("gpt", "one")], "tools": tools}
    [found] = from_rows(tmp_path, rows)
    assert list(found.messages) == [
        said("user", "q"),
        said("assistant", "", tool_calls=[CALL]),
        said("tool", "1"),
        said("assistant", "one"),
    ]
    assert found.taught == (1, 3)
    assert found.tools == (SCHEMA,)


def test_nulls_that_parquet_adds_are_no_arguments(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
    rows = [[said("user", "q"), said("assistant", "", tool_calls=[call])] for call in (CALL, other)]
    pq.write_table(pa.table({"messages": rows}), tmp_path / "rows.parquet")
    found = list(read(str(tmp_path / "rows.parquet")))
    assert [each.messages[1]["tool_calls"] for each in found] == [[CALL], [other]]
    assert found[0].messages[0] == said("user", "q")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "no conversation is in the fields 'text': give 'messages'"),
        ({"messages": []}, "the field 'messages' holds no messages"),
        ({"messages": "x"}, "the field 'messages' must be a list, and is text"),
        ({"messages": ["x"]}, "the field 'messages' must hold an object, and holds text"),
        ({"messages": [{"content": "x"}]}, "the field 'role' is missing"),
        ({"messages": [said("user", None)]}, "the field 'content' is null"),
        ({"messages": [said("user", [{"type": "image"}])]}, "the field 'text' is missing"),
        ({"messages": TALK[:2]}, "'messages' has no message of the assistant to learn from, behind another"),
        ({"messages": [said("assistant", "a")]}, "'messages' has no message of the assistant to learn from"),
        ({"messages": [*TALK[:2], said("assistant", "a", weight=2)]}, "a message whose weight is neither 0 nor 1"),
        ({"conversations": [told("alien", "x")]}, "the field 'from' is 'alien', and may be human, user, gpt"),
        ({"instruction": "q", "output": None}, "the field 'output' is null"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "'history' must hold pairs of texts"),
        ({"prompt": "q", "completion": ["x"]}, "the field 'completion' must hold an object"),
        ({"messages": TALK, "tools": "x"}, "the field 'tools' must be JSON"),
        (
            {"messages": [*TALK[:2], said("assistant", "", tool_calls=[{"function": {"arguments": "x"}}])]},
            "'arguments'",
        ),
        (
            {"messages": [*TALK[:2], said("assistant", "", tool_calls=[{"function": {}}])]},
            "the field 'name' is missing",
        ),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_field(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadRow, match=rf"rows\.jsonl:2.*{words}"):
        from_rows(tmp_path, SHAPES["messages"], row)
    skipped: list[BadRow] = []
    assert len(list(read(str(tmp_path / "rows.jsonl"), on_bad=skipped.append))) == len(skipped) == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a", "", "user", "\ud800", "{}", "[]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "text"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
NAMES = ["messages", "conversations", "instruction", "output", "prompt", "completion", "tools", "history", "system"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(row=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_any_row_is_a_conversation_or_a_bad_row(row: dict[str, Any], tmp_path: Path) -> None:
    path, skipped = tmp_path / "rows.jsonl", list[BadRow]()
    path.write_text(json.dumps(row))
    found = list(read(str(path), on_bad=skipped.append))
    assert len(found) + len(skipped) == 1
    assert not any("\n" in str(error) for error in skipped)
    assert all(each.messages[place]["role"] == "assistant" for each in found for place in each.taught)
