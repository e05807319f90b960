"""Adapts environments of Prime Intellect's package `verifiers`, recognised by their methods and never imported.

One object of theirs serves all episodes, each with a dict for its state: `setup_state(state)`, `is_completed(state)`,
`env_response(messages, state)` and `rubric.score_rollout(state)`, as from version 0.1.8 on. The model's turns are put
into the state's trajectory here, since their own loop would ask an OpenAI client for them.
"""

import inspect
import json
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from lockstep.rl.environments.protocol import Message, Reply, Turn
from lockstep.rl.environments.tool_calls import calls_of
from lockstep.rl.types import Prompt
from lockstep.rl.verdict import of_credit


def is_foreign(made: object) -> bool:
    """Whether an object has the methods of an environment of `verifiers`."""
    return all(hasattr(made, name) for name in ("env_response", "is_completed", "setup_state", "rubric"))


class PrimeEnvironment:
    """One episode of a `MultiTurnEnv` of `verifiers`, as an `Environment`."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    async def reset(self, prompt: Prompt) -> None:
        """See `Environment.reset`. The prompt becomes one user message, as the model reads it."""
        opening = [{"role": "user", "content": prompt.text}]
        row = {"prompt": opening, "answer": prompt.answer, "task": "default", "info": {}, "example_id": prompt.index}
        self._state = await self._shared.setup_state(await self._new_state(row))
        self._messages: list[dict[str, Any]] = list(opening)

    async def step(self, turn: Turn) -> Reply:
        """See `Environment.step`. Raises ValueError for a reward outside of 0 to 1."""
        said = _message(turn.text)
        step = {"prompt": list(self._messages), "completion": [said], "response": None, "tokens": None, "reward": None}
        self._state["trajectory"].append(step | {"advantage": None, "extras": {}})
        self._messages.append(said)
        if await self._shared.is_completed(self._state) or turn.last or not turn.whole:
            return Reply(verdict=of_credit(await self._reward()))
        heard: Sequence[dict[str, Any]] = await self._shared.env_response(list(self._messages), self._state)
        self._messages += heard
        return Reply(tuple(Message(m["role"], str(m["content"])) for m in heard))

    async def close(self) -> None:
        """Does nothing: an environment of `verifiers` cleans up when it is complete."""

    async def _new_state(self, row: dict[str, Any]) -> Any:
        if hasattr(self._shared, "init_state"):
            return await self._shared.init_state(row, None, "policy", None)
        return row | {"input": row, "trajectory": [], "reward": None, "metrics": None, "timing": {}}

    async def _reward(self) -> float:
        self._state["completion"] = self._messages[1:]
        score = self._shared.rubric.score_rollout
        asks_for_more = len(inspect.signature(score).parameters) > 1
        unlimited: AbstractAsyncContextManager[None] = nullcontext()
        await (score(self._state, unlimited) if asks_for_more else score(self._state))
        return float(self._state["reward"])


def _message(text: str) -> dict[str, Any]:
    """A turn as an assistant message of OpenAI's API, tool calls in a field of their own."""
    calls = [
        {"id": str(i), "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
        for i, c in enumerate(calls_of(text))
    ]
    return {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})
