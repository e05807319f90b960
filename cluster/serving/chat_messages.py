"""Messages of chat bodies, and what chat templates get of them: text, tool calls, and results of tools."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast

from lockstep.cluster.serving.errors import Refused, unsupported
from lockstep.data.json_text import parsed_json


def _parts(given: Any) -> Any:
    """The parts of a message's content; a plain text is one part."""
    return [{"type": "text", "text": given}] if isinstance(given, str) else given


class Part(BaseModel):
    """One text part of a message's content."""

    model_config = ConfigDict(strict=True, frozen=True)

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """The function of a call, with its arguments as JSON in a text."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that an earlier answer made."""

    model_config = ConfigDict(strict=True, frozen=True)

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part] | None, FailFast(), BeforeValidator(_parts)] = None
    tool_calls: Annotated[list[ToolCall] | None, FailFast()] = None
    tool_call_id: str | None = None

    def plain(self, place: str) -> dict[str, Any]:
        """The message as chat templates take it; the role `developer` becomes `system`, arguments become objects.

        Args:
            place: of the message in the body.

        Raises:
            Refused: names what is wrong.
        """
        if self.tool_calls and self.role != "assistant":
            raise unsupported(f"{place}.tool_calls")
        for name in ("function_call", "audio"):
            if (self.model_extra or {}).get(name):
                raise unsupported(f"{place}.{name}")
        if self.content is None and not self.tool_calls:
            raise Refused(400, f"{place}.content is missing", param=f"{place}.content")
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        found["content"] = "".join(part.text for part in self.content or ())
        if self.tool_calls:
            calls = enumerate(self.tool_calls)
            found["tool_calls"] = [_plain_call(call, f"{place}.tool_calls.{i}") for i, call in calls]
        if self.role == "tool" and self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        return found


def _plain_call(call: ToolCall, place: str) -> dict[str, Any]:
    arguments = parsed_json(call.function.arguments or "{}")
    if not isinstance(arguments, dict):
        place = f"{place}.function.arguments"
        raise Refused(400, f"{place} has to be a JSON object in a text", param=place)
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
