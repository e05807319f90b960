"""Tools that a model may call, and the environment that runs the calls of a turn and answers with their results.

An error of the model's (no such tool, no arithmetic, a program that fails) is a result that it reads. An error of the
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
"""Characters of a result at most."""


class ToolError(ValueError):
    """A call that fails through the model's own mistake; the message is the call's result."""


@dataclass(frozen=True)
class Signature:
    """Name, description and parameters of a tool, as a model is told of it."""

    name: str
    description: str
    parameters: Mapping[str, str]
    """Each argument's name and description; all are required."""

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema that chat templates and OpenAI's API take."""
        named = {name: {"type": "string", "description": text} for name, text in self.parameters.items()}
        parameters = {"type": "object", "properties": named, "required": list(named)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


@dataclass(frozen=True)
class Tool:
    """A function that a model may call by name, with strings for arguments."""

    signature: Signature
    run: Callable[..., Awaitable[str]]
    """Takes the arguments by name and returns the result; raises ToolError for the model's mistakes."""


class ToolEnvironment:
    """Runs all calls of a turn concurrently and answers with their results; a turn without a call ends the episode."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = {tool.signature.name: tool for tool in tools}

    async def reset(self, prompt: Prompt) -> None:
        """Does nothing: no state is kept between calls."""

    async def step(self, turn: Turn) -> Reply:
        """See `Environment.step`."""
        calls = calls_of(turn.text) if turn.whole and not turn.last else []
        results = await asyncio.gather(*map(self._result, calls))
        return Reply(tuple(Message("tool", result) for result in results))

    async def close(self) -> None:
        """Does nothing: an episode holds nothing."""

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
    """The text cut to `LONGEST` characters, with the number of those left out."""
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
