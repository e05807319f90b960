"""Parses tool calls in the format of Hermes and Qwen.

<tool_call>
{"name": "calculator", "arguments": {"expression": "12 * 34"}}
</tool_call>
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A tool call that a model wrote, or what is wrong with it."""

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def calls_of(text: str) -> list[Call]:
    """The tool calls of a turn, in order; one without its end tag counts, as a stop string may have cut it off."""
    return [_call(found) for found in _CALL.findall(text)]


def _call(text: str) -> Call:
    try:
        given = json.loads(text)
        name, arguments = given["name"], given.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Call(problem='a call is JSON of the form {"name": …, "arguments": {…}}, and this is not')
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return Call(problem="a call has a text for its name and an object for its arguments")
    return Call(name, arguments)


def described(schemas: Sequence[dict[str, Any]]) -> str:
    """The part of a system message that lists tools, given their JSON schemas, and says how to call them."""
    listed = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
    return (
        f"You can call these functions:\n<tools>\n{listed}\n</tools>\n"
        "To call one, write a JSON object with its name and arguments and end your turn:\n"
        '<tool_call>\n{"name": "…", "arguments": {…}}\n</tool_call>\n'
        "You are given the result and go on. A turn without a call is your final answer."
    )
