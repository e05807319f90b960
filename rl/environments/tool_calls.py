"""Parses tool calls in the format of Hermes and Qwen.

<tool_call>
{"name": "calculator", "arguments": {"expression": "12 * 34"}}
</tool_call>
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """A tool call that a model wrote, or what is wrong with it."""

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    written: str = ""
    """As it stands in the text, with its tags."""


class CallParser:
    """Splits a text, which may grow, into what is said and the tool calls in it.

    What is said is given as soon as no tag can begin in it. White space before a call belongs to neither.
    """

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str, *, last: bool = False) -> list[str | Call]:
        """Add a part of the text; returns what is certain now, in order.

        Args:
            last: whether the text ends; a call without its end tag counts then, as a stop string may have cut it off.
        """
        self._held += text
        found: list[str | Call] = []
        while BEGIN in self._held:
            said, _, rest = self._held.partition(BEGIN)
            written, end, rest = rest.partition(END)
            found += [said.rstrip()] if said.strip() else []
            if not end and not last:
                self._held = BEGIN + written
                return found
            found.append(_call(written, BEGIN + written + end))
            self._held = rest
        certain = len(self._held) if last else _certain(self._held)
        found += [self._held[:certain]] if certain else []
        self._held = self._held[certain:]
        return found


def _certain(text: str) -> int:
    """Characters of a text without a whole tag that stand before white space and a part of a tag at its end."""
    begun = next(n for n in range(len(BEGIN) - 1, -1, -1) if text.endswith(BEGIN[:n]))
    return len(text[: len(text) - begun].rstrip())


def calls_of(text: str) -> list[Call]:
    """The tool calls of a turn, in order; one without its end tag counts, as a stop string may have cut it off."""
    return [part for part in CallParser().add(text, last=True) if isinstance(part, Call)]


def _call(text: str, written: str) -> Call:
    try:
        given = json.loads(text)
        name, arguments = given["name"], given.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problem = 'a call is JSON of the form {"name": …, "arguments": {…}}, and this is not'
        return Call(problem=problem, written=written)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return Call(problem="a call has a text for its name and an object for its arguments", written=written)
    return Call(name, arguments, written=written)


def described(schemas: Sequence[dict[str, Any]]) -> str:
    """The part of a system message that lists tools, given their JSON schemas, and says how to call them."""
    listed = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
    return (
        f"You can call these functions:\n<tools>\n{listed}\n</tools>\n"
        "To call one, write a JSON object with its name and arguments and end your turn:\n"
        '<tool_call>\n{"name": "…", "arguments": {…}}\n</tool_call>\n'
        "You are given the result and go on. A turn without a call is your final answer."
    )
