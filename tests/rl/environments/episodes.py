"""Environments for tests, which a worker loads by their names."""

import asyncio
import time
from pathlib import Path
from typing import Any

from lockstep.rl.environments.protocol import Message, Reply, Turn
from lockstep.rl.types import Prompt
from lockstep.rl.verdict import Outcome, Verdict


class Asking:
    """Asks on after every turn; credit is by the length of the last one. Notes its life in a file."""

    def __init__(self, folder: str = "") -> None:
        self._folder = folder

    async def reset(self, prompt: Prompt) -> None:
        self._index = prompt.index
        self._note("began")

    async def step(self, turn: Turn) -> Reply:
        if turn.last or not turn.whole:
            return Reply(verdict=Verdict(Outcome.incorrect, credit=len(turn.text) % 5 / 5))
        return Reply((Message("user", f"And {turn.number}?"),))

    async def close(self) -> None:
        self._note("ended")

    def _note(self, what: str) -> None:
        if self._folder:
            (Path(self._folder) / f"{self._index}-{what}").touch()


class Greeting(Asking):
    """Speaks first: a number of the sample's own, of which those that divide by 3 end the episode at once."""

    async def first_observation(self, seed: int) -> Reply:
        if self._index == 4:
            raise OSError("the disk is full")
        if seed % 3 == 0:
            return Reply(verdict=Verdict(Outcome.incorrect, credit=0.5))
        return Reply((Message("user", f"Round {seed % 1000}."),))


class Troubled(Asking):
    """As its prompt's answer says: "slow", "blocking" or "failing", or well behaved; one turn else."""

    async def reset(self, prompt: Prompt) -> None:
        await super().reset(prompt)
        self._how = prompt.answer

    async def step(self, turn: Turn) -> Reply:
        match self._how:
            case "slow":
                await asyncio.sleep(60)
            case "blocking":
                time.sleep(2)
            case "failing":
                raise OSError("the disk is full")
        return Reply(verdict=Verdict(Outcome.correct))


class Rubric:
    """Of `verifiers`' shape."""

    async def score_rollout(self, state: dict[str, Any]) -> None:
        said = [m["content"] for m in state["completion"] if m["role"] == "assistant"]
        state["reward"] = float(said[-1] == state["answer"])


class Guessing:
    """A game of `verifiers`' shape: says whether the number is higher or lower."""

    rubric = Rubric()

    async def setup_state(self, state: dict[str, Any]) -> dict[str, Any]:
        state["secret"] = int(state["answer"])
        return state

    async def is_completed(self, state: dict[str, Any]) -> bool:
        last = state["trajectory"][-1]["completion"][-1]["content"]
        return bool(last == state["answer"])

    async def env_response(self, messages: list[dict[str, Any]], state: dict[str, Any]) -> list[dict[str, Any]]:
        guess = int(messages[-1]["content"])
        return [{"role": "user", "content": "higher" if guess < state["secret"] else "lower"}]


def load_guessing() -> Guessing:
    """As their packages offer it."""
    return Guessing()
