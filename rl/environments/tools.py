"""Tools that a model may call, and the environment that has them: what goes wrong with a call is said in its result.

An error that the model made (no such tool, no arithmetic, a program that fails) is text that it reads. An error of the
tool itself is raised, and makes the rollout ungradable: nothing is learned from a broken tool.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.rl.environments.calculator import NoArithmetic, calculate
from lockstep.rl.environments.protocol import Message, Reply, Turn
from lockstep.rl.environments.tool_calls import Call, calls_of
from lockstep.rl.types import Prompt

LONGEST = 4000
"""Characters of a result."""


class ToolError(ValueError):
    """A call that fails by the model's own doing; its sentence is the call's result."""


@dataclass(frozen=True)
class Signature:
    """What a model is told of a tool."""

    name: str
    description: str
    parameters: Mapping[str, str]
    """Name of each argument, all of which are needed, and what it is."""

    @property
    def schema(self) -> dict[str, Any]:
        """As chat templates and OpenAI's interface have it."""
        named = {name: {"type": "string", "description": text} for name, text in self.parameters.items()}
        parameters = {"type": "object", "properties": named, "required": list(named)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


@dataclass(frozen=True)
class Tool:
    """A function that a model may call by name, with text for arguments."""

    signature: Signature
    run: Callable[..., Awaitable[str]]
    """Takes the arguments by name; raises ToolError where the model is to blame."""


class ToolEnvironment:
    """Answers each call of a turn, all at the same time; a turn without one ends the episode."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = {tool.signature.name: tool for tool in tools}

    async def reset(self, prompt: Prompt) -> None:
        """Nothing is kept from call to call."""

    async def step(self, turn: Turn) -> Reply:
        """See `Environment.step`."""
        calls = calls_of(turn.text) if turn.whole and not turn.last else []
        results = await asyncio.gather(*map(self._result, calls))
        return Reply(tuple(Message("tool", result) for result in results))

    async def close(self) -> None:
        """Nothing is held."""

    async def _result(self, call: Call) -> str:
        if call.problem:
            return f"error: {call.problem}"
        tool = self._tools.get(call.name)
        if tool is None:
            return f"error: there is no tool {call.name!r}: call one of {', '.join(self._tools)}"
        wanted = tool.signature.parameters
        if set(call.arguments) != set(wanted):
            return f"error: {call.name} takes {', '.join(wanted)}, and {', '.join(call.arguments) or 'nothing'} came"
        try:
            return shortened(await tool.run(**{name: str(value) for name, value in call.arguments.items()}))
        except ToolError as error:
            return f"error: {shortened(str(error))}"


def shortened(text: str) -> str:
    """At most `LONGEST` characters, and how many were left out."""
    left_out = len(text) - LONGEST
    return text if left_out <= 0 else f"{text[:LONGEST]}… ({left_out} characters more)"


async def _calculated(expression: str) -> str:
    try:
        return calculate(expression)
    except NoArithmetic as error:
        raise ToolError(str(error)) from error


CALCULATOR = Tool(
    Signature(
        "calculator",
        "Calculates exactly with whole numbers, decimals and fractions.",
        {"expression": "arithmetic with + - * / // % ^ and parentheses, such as (12 + 34) / 4"},
    ),
    _calculated,
)
