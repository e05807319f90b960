"""Environments of one turn for reasoning-gym's tasks: the task's own score of the answer is the verdict."""

import asyncio

from lockstep.rl.environments.protocol import Reply, Turn
from lockstep.rl.types import Prompt
from lockstep.rl.verifiers.answer_pool import AnswerPool


class ReasoningGymEnvironment:
    """One problem: the first turn is the answer, graded in a process that can be killed."""

    def __init__(self, pool: AnswerPool) -> None:
        """
        Args:
            pool: grades with `verifiers.reasoning_gym.grade`.
        """
        self._pool = pool

    async def reset(self, prompt: Prompt) -> None:
        """Keeps the entry of reasoning-gym: the prompt's answer, as `data.tasks.problem.entry_text` writes it."""
        self._entry = prompt.answer

    async def step(self, turn: Turn) -> Reply:
        """Ends the episode with the verdict on the turn."""
        graded = await asyncio.to_thread(self._pool.grade, [(turn.text, self._entry)])
        return Reply(verdict=graded[0])

    async def close(self) -> None:
        """Does nothing: an episode holds nothing."""
