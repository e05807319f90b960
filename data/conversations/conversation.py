"""Reads conversations for supervised fine-tuning (SFT): `messages`, ShareGPT, Alpaca, and prompts with completions.

The shape of a row is known by its fields. What the assistant says in a conversation is learned from; the first message
of a conversation is not, whoever's it is, since no model is asked for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lockstep.data.conversations.messages import Message, messages_of, question, tools_of
from lockstep.data.row_reader import BadRow, OnBad, Row, read_rows, stop


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, and which of them are learned from."""

    messages: tuple[Message, ...]
    taught: tuple[int, ...]
    """Places of messages of the assistant that are learned from, in order; one or more, none the first."""
    tools: tuple[dict[str, Any], ...] | None = None
    """JSON schemas of the functions that the assistant may call."""
    place: str = ""
    """File and line, for errors."""

    @property
    def is_plain(self) -> bool:
        """Whether it is one prompt and its completion, both texts."""
        said = [(message["role"], len(message)) for message in self.messages]
        return self.taught == (1,) and said == [("user", 2), ("assistant", 2)]


def read(source: str, *, on_bad: OnBad = stop) -> Iterator[Conversation]:
    """Read conversations from JSON lines, Parquet or JSON files, a folder of them, or a data set on the Hub.

    Recognised are OpenAI's and TRL's `messages` (`role`, `content`, and `tool_calls` with `tools`), ShareGPT's
    `conversations` (`from`, `value`), Alpaca's `instruction`, `input`, `output`, `system`, `history`, and `prompt` with
    `completion`, each a text or messages, of which the completion's are learned from. A message of the assistant with
    `weight` 0 is not learned from, as OpenAI's fine-tuning has it.

    Args:
        source: see `row_reader.read_rows`.
        on_bad: called with the error of each bad row, which is skipped; the default raises it.

    Raises:
        BadRow: names file, line and field.
    """
    for row in read_rows(source, on_bad=on_bad):
        try:
            yield _conversation(row)
        except BadRow as error:
            on_bad(error)


def _conversation(row: Row) -> Conversation:
    if row.has("messages"):
        return _taught(row, "messages", messages_of(row, "messages"))
    if row.has("conversations"):
        return _taught(row, "conversations", _system(row) + messages_of(row, "conversations"))
    if "instruction" in row.values and "output" in row.values:
        return _taught(row, "output", _system(row) + _alpaca(row))
    if "prompt" in row.values and "completion" in row.values:
        prompt = _said(row, "prompt", "user")
        return _taught(row, "completion", prompt + _said(row, "completion", "assistant"), len(prompt))
    raise BadRow(
        f"{row.place}: no conversation is in the fields {', '.join(map(repr, row.values)) or 'none'}: give 'messages', "
        "'conversations', 'instruction' with 'output', or 'prompt' with 'completion'"
    )


def _taught(row: Row, name: str, messages: list[dict[str, Any]], first: int = 1) -> Conversation:
    """The conversation of messages, of which those of the assistant from `first` on are learned from."""
    weights = [message.pop("weight", 1) for message in messages]
    if not all(weight in (0, 1) for weight in weights):
        raise row.bad(name, "has a message whose weight is neither 0 nor 1")
    said = [place for place, message in enumerate(messages) if message["role"] == "assistant" and weights[place]]
    taught = tuple(place for place in said if place >= max(first, 1))
    if not taught:
        raise row.bad(name, "has no message of the assistant to learn from, behind another message")
    tools = tools_of(row)
    return Conversation(tuple(messages), taught, tuple(tools) if tools else None, row.place)


def _system(row: Row) -> list[dict[str, Any]]:
    return [{"role": "system", "content": row.text("system")}] if row.has("system") else []


def _alpaca(row: Row) -> list[dict[str, Any]]:
    """The turns of a row of Alpaca's shape; `history` holds pairs of what was asked and said before."""
    turns = [*_history(row), (question(row), row.text("output"))]
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _history(row: Row) -> list[tuple[str, str]]:
    if not row.has("history"):
        return []
    pairs = [row.checked("history", each, list) for each in row.items("history")]
    if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
        raise row.bad("history", "must hold pairs of texts: what was asked, and what was said")
    return [(row.sound("history", asked), row.sound("history", said)) for asked, said in pairs]


def _said(row: Row, name: str, role: str) -> list[dict[str, Any]]:
    """The messages of a field, or its text as one of a role."""
    if isinstance(row.values.get(name), str | int | float):
        return [{"role": role, "content": row.text(name)}]
    return messages_of(row, name)
