"""Messages of rows, as chat templates take them: `role` and `content`, or `from` and `value` as ShareGPT has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.data.json_text import Bad, parsed_json
from lockstep.data.row_reader import Row

Message = Mapping[str, Any]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""What `from` says, and the role that it means."""
_READ = ("role", "content", "from", "value", "tool_calls")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation that is a text."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


def messages_of(row: Row, name: str) -> list[dict[str, Any]]:
    """The messages in a field of a row: a list of them, or one alone.

    Contents are texts, or lists of parts that are texts. Arguments of `tool_calls` that are JSON texts are parsed,
    since chat templates want objects; keys that are null, as Parquet has them, are left out. Other keys of a message
    (`name`, `tool_call_id`, `reasoning_content`, …) stay for the template.

    Raises:
        BadRow: when there are none, or one is no message.
    """
    given = [row.values[name]] if isinstance(row.values.get(name), Mapping) else row.items(name)
    found = [_message(Row(row.place, row.checked(name, each, dict))) for each in given]
    if not found:
        raise row.bad(name, "holds no messages")
    return found


def turns_of(row: Row, name: str) -> list[Turn]:
    """The messages in a field of a row, where all of them are texts; see `messages_of`.

    Raises:
        BadRow: when there are none, or one is no text.
    """
    found = messages_of(row, name)
    if any("tool_calls" in message for message in found):
        raise row.bad(name, "holds a call of a tool, where only texts are compared")
    return [Turn(message["role"], message["content"]) for message in found]


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The JSON schemas of tools in the field `tools`, a list or JSON text of one; None where there are none.

    Raises:
        BadRow: when it is something else.
    """
    if not row.has("tools"):
        return None
    found = row.checked("tools", row.json("tools"), list)
    return [_without_nulls(row.checked("tools", each, dict)) for each in found] or None


def question(row: Row) -> str:
    """What is asked in a row of Alpaca's shape: the instruction and, on a line of its own, its input where it has one.

    Raises:
        BadRow: when one of them is no text.
    """
    return "\n".join([row.text("instruction"), *([row.text("input")] if row.has("input") else [])])


def _message(said: Row) -> dict[str, Any]:
    kept = {key: value for key, value in said.values.items() if key not in _READ and value is not None}
    calls = _calls(said)
    return {"role": _role(said), "content": _content(said, calls), **({"tool_calls": calls} if calls else {}), **kept}


def _role(said: Row) -> str:
    if "from" not in said.values:
        return said.text("role")
    found = _ROLES.get(said.text("from").lower())
    if found is None:
        raise said.bad("from", f"is {said.text('from')!r}, and may be {', '.join(_ROLES)}")
    return found


def _content(said: Row, calls: list[dict[str, Any]]) -> str:
    """What a message says: a text, or parts that are texts; nothing where it calls tools."""
    name = "value" if "from" in said.values else "content"
    if calls and (said.values.get("from") == "function_call" or said.values.get(name) is None):
        return ""
    if not isinstance(said.values.get(name), list):
        return said.text(name)
    parts = [Row(said.place, said.checked(name, part, dict)) for part in said.items(name)]
    return "".join(part.text("text") for part in parts)


def _calls(said: Row) -> list[dict[str, Any]]:
    """The calls of tools of a message, in the form of `tool_calls`."""
    if said.values.get("from") == "function_call":
        return [{"type": "function", "function": _function(said, said.json("value"))}]
    if said.values.get("tool_calls") is None:
        return []
    found = [_without_nulls(said.checked("tool_calls", each, dict)) for each in said.items("tool_calls")]
    return [
        each | {"function": _function(said, each["function"])} if "function" in each else _function(said, each)
        for each in found
    ]


def _function(said: Row, given: Any) -> dict[str, Any]:
    """A call of a function, with its arguments as an object."""
    call = Row(said.place, _without_nulls(said.checked("tool_calls", given, dict)))
    arguments = call.values.get("arguments", {})
    parsed = parsed_json(arguments) if isinstance(arguments, str) else arguments
    if isinstance(parsed, Bad) or not isinstance(parsed, dict):
        raise call.bad("arguments", "must be an object, or JSON text of one")
    return {**call.values, "name": call.text("name"), "arguments": parsed}


def _without_nulls(value: Any) -> Any:
    """An object without its keys that are null, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
