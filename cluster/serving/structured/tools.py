"""The fields `tools`, `tool_choice` and `parallel_tool_calls` of chats, and the grammar of calls that have to be made.

Calls have the form of Hermes and Qwen, <tool_call>{json}</tool_call>, which many chat templates teach.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockstep.cluster.serving.errors import Refused
from lockstep.cluster.serving.structured.response_format import json_rule
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.environments.tool_calls import BEGIN, END

_PROBE = "7f3a-what-a-tool-says"


class FunctionBody(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool | None = None


class ToolBody(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(strict=True, frozen=True)

    type: Literal["function"]
    function: FunctionBody

    @property
    def schema_of_template(self) -> dict[str, Any]:
        """What chat templates get."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


@dataclass(frozen=True)
class Forced:
    """A choice of one function by its name."""

    name: str


Choice = Literal["auto", "none", "required"] | Forced


def choice(given: Any) -> Choice:
    """The value of `tool_choice`.

    Raises:
        ValueError: when it is none.
    """
    if given in ("auto", "none", "required"):
        found: Choice = given
        return found
    match given:
        case {"type": "function", "function": {"name": str(name)}}:
            return Forced(name)
    raise ValueError('it has to be "auto", "none", "required", or {"type": "function", "function": {"name": …}}')


@dataclass(frozen=True)
class ToolUse:
    """The tools of a chat, and what may be done with them."""

    tools: Sequence[ToolBody]
    choice: Choice
    parallel: bool
    """Whether an answer may have several calls."""

    @property
    def parses(self) -> bool:
        """Whether calls in the answer are told apart from its text."""
        return self.choice != "none"

    @property
    def of_template(self) -> list[dict[str, Any]]:
        """What the chat template gets."""
        return [tool.schema_of_template for tool in self.tools]

    def lark(self) -> str | None:
        """The grammar of the calls that the answer has to consist of; None where it need not call.

        Raises:
            Refused: when the named function is not among the tools.
        """
        if self.choice in ("auto", "none"):
            return None
        wanted = [t for t in self.tools if not isinstance(self.choice, Forced) or t.function.name == self.choice.name]
        if not wanted:
            raise Refused(400, "tool_choice names a function that is not among tools", param="tool_choice")
        return calls_lark(wanted, parallel=self.parallel)

    def check(self, tokenizer: Tokenizer) -> None:
        """Check that the chat template shows tools, and teaches the form of calls that is read.

        Raises:
            Refused: when it does not.
        """
        asked = [{"role": "user", "content": "…"}]
        shown, bare = tokenizer.chat(asked, tools=self.of_template), tokenizer.chat(asked)
        if shown == bare:
            raise Refused(400, "the model's chat template does not show tools: leave tools out", param="tools")
        if BEGIN not in shown or any(tag in tokenizer.special.values() for tag in (BEGIN, END)):
            raise Refused(
                400,
                f"the model's chat template teaches calls in another form than {BEGIN}{{json}}{END}, which alone is "
                "read: use another model, or leave tools out",
                param="tools",
            )


def calls_lark(tools: Sequence[ToolBody], *, parallel: bool) -> str:
    """The grammar of one call or more in llguidance's Lark format, as chat templates of Hermes and Qwen write them.

    Args:
        parallel: whether there may be more than one.
    """
    literal = json.dumps
    begin, middle, end = (literal(text) for text in (f'{BEGIN}\n{{"name": ', ', "arguments": ', f"}}\n{END}"))
    names = " | ".join(f"function_{i}" for i in range(len(tools)))
    lines = [
        'start: call ("\\n" call)*' if parallel else "start: call",
        f"call: {begin} ({names}) {end}",
        *(f"function_{i}: {literal(literal(t.function.name))} {middle} arguments_{i}" for i, t in enumerate(tools)),
        *(f"arguments_{i}: {json_rule(tool.function.parameters)}" for i, tool in enumerate(tools)),
    ]
    return "\n".join(lines)


def check_shows_results(tokenizer: Tokenizer) -> None:
    """Check that the chat template shows calls and their results, for a conversation that has some.

    Raises:
        Refused: when it leaves them out.
    """
    function = {"name": _PROBE, "arguments": {}}
    shown = tokenizer.chat(
        [
            {"role": "user", "content": "…"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": f"result {_PROBE}", "tool_call_id": "call"},
        ]
    )
    if f"result {_PROBE}" not in shown or shown.count(_PROBE) < 2:
        raise Refused(400, "the model's chat template does not show tool calls and their results", param="messages")
