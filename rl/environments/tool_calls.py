"""Parses tool calls in the format of Hermes and Qwen, and encodes tool results behind the tokens of a turn.

    <tool_call>
    {"name": "calculator", "arguments": {"expression": "12 * 34"}}
    </tool_call>

Results are messages of the chat template. Only what is new is encoded: the template renders a conversation with a
stand-in where the model spoke, and what follows the stand-in is the answer, up to where the next assistant turn begins.
What the model wrote is never rendered: its tokens stay what they are, also where its text has other tokens. What
messages say is text: no result of a tool can end its own message and begin another.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep.data.chat_template import BadTemplate, RefusedChat
from lockstep.data.control_tokens import Marked
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.environments.protocol import Message

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_STAND_IN, _PROBE = "0d5f3a-what-the-model-said", "0d5f3a-what-it-hears"


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


class ChatForm:
    """Encodes an environment's messages as tokens to append to a model's turn."""

    def __init__(self, tokenizer: Tokenizer, *, chat: bool) -> None:
        """
        Args:
            chat: whether prompts use the tokenizer's chat template; messages are lines of plain text otherwise.
        """
        self._tokenizer, self._chat = tokenizer, chat
        self._known: dict[str, bool] = {}

    def answer(self, turn: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """Tokens to append to those of a turn, the end-of-turn token included where the model has not written it.

        Raises:
            BadTemplate, RefusedChat: when there is no chat template, or it refuses the messages.
        """
        if not self._chat:
            return self._tokenizer.continuation(Marked(_STAND_IN), self._plain(messages))
        (before, after), end = self._rendered(messages), self._tokenizer.turn_end
        if turn and turn[-1] == end.token and after.startswith(end.text):
            before, after = Marked(before + end.text), Marked(after.removeprefix(end.text))
        return self._tokenizer.continuation(before, after)

    def _plain(self, messages: Sequence[Message]) -> Marked:
        return self._tokenizer.marked("".join(f"\n{_tagged(m)}\n" for m in messages))

    def _rendered(self, messages: Sequence[Message]) -> tuple[Marked, Marked]:
        """What the template renders up to the end of a turn, and behind it.

        Tool results are user messages where it has no tool role.
        """
        return self._after_stand_in(messages if all(self._knows(m.role) for m in messages) else [_as_user(messages)])

    def _knows(self, role: str) -> bool:
        """Whether the template renders messages of a role."""
        if role not in self._known:
            try:
                self._known[role] = _PROBE in self._after_stand_in([Message(role, _PROBE)])[1]
            except RefusedChat:
                self._known[role] = False
        return self._known[role]

    def _after_stand_in(self, messages: Sequence[Message]) -> tuple[Marked, Marked]:
        opening = [{"role": "user", "content": "…"}, {"role": "assistant", "content": _STAND_IN}]
        spoken = [{"role": m.role, "content": m.content} for m in messages]
        whole = self._tokenizer.render([*opening, *spoken])
        before, found, after = whole.rpartition(_STAND_IN)
        if not found:
            raise BadTemplate(
                f"the chat template leaves out what an assistant said ({whole[:80]!r} is all): use another template"
            )
        return Marked(before + found), Marked(after)


def _as_user(messages: Sequence[Message]) -> Message:
    return Message("user", "\n".join(_tagged(m) for m in messages))


def _tagged(message: Message) -> str:
    return f"<tool_response>\n{message.content}\n</tool_response>" if message.role == "tool" else message.content
