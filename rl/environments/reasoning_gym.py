"""reasoning-gym's tasks as environments of one turn, whose score of the answer is the verdict."""

import asyncio

from lockstep.rl.environments.protocol import Reply, Turn
from lockstep.rl.types import Prompt
from lockstep.rl.verifiers.answer_pool import AnswerPool


class ReasoningGymEnvironment:
    """One problem: the turn is the answer, graded in a process that can be killed."""

    def __init__(self, pool: AnswerPool) -> None:
        """
        Args:
            pool: grades with `verifiers.gym.grade`.
        """
        self._pool = pool

    async def reset(self, prompt: Prompt) -> None:
        """The prompt's answer is the entry of reasoning-gym, as `data.problem.entry_text` writes it."""
        self._entry = prompt.answer

    async def step(self, turn: Turn) -> Reply:
        """The verdict."""
        graded = await asyncio.to_thread(self._pool.grade, [(turn.text, self._entry)])
        return Reply(verdict=graded[0])

    async def close(self) -> None:
        """Nothing is held."""
