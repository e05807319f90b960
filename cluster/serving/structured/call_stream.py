"""Tells tool calls from the text of a choice, as it is written."""

import json
import uuid
from dataclasses import dataclass, field
from typing import Any, Self

from lockstep.cluster.serving.structured.tools import ToolUse
from lockstep.rl.environments.tool_calls import Call, CallParser


@dataclass(frozen=True)
class WrittenCall:
    """A tool call of a choice."""

    index: int
    """Among those of the choice."""
    call: Call
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex}")

    @property
    def json(self) -> dict[str, Any]:
        """The object of `tool_calls`."""
        arguments = json.dumps(self.call.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.call.name, "arguments": arguments}}


class CallStream:
    """Splits the growing text of one choice; what is written in the form of a call and is none stays text."""

    def __init__(self, *, parallel: bool) -> None:
        """
        Args:
            parallel: whether there may be several calls; what follows the first is left out otherwise.
        """
        self._parser, self._parallel = CallParser(), parallel
        self._count = 0

    @classmethod
    def of(cls, tools: ToolUse | None) -> Self | None:
        """The splitter of a choice, where it may call tools."""
        return cls(parallel=tools.parallel) if tools and tools.parses else None

    def add(self, text: str, finish_reason: str | None) -> tuple[str, tuple[WrittenCall, ...], str | None]:
        """Add text; returns the text and the calls that are certain, and why the choice ends.

        Args:
            finish_reason: with the last text; `stop` becomes `tool_calls` where there were some.
        """
        said, calls = "", list[WrittenCall]()
        for part in self._parser.add(text, last=finish_reason is not None):
            if self._count and not self._parallel:
                break
            if isinstance(part, Call) and not part.problem:
                calls.append(WrittenCall(self._count, part))
                self._count += 1
            else:
                said += part.written if isinstance(part, Call) else part
        if self._count and said.isspace():
            said = ""
        return said, tuple(calls), "tool_calls" if self._count and finish_reason == "stop" else finish_reason
