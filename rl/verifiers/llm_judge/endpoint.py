"""Asks an endpoint again with exponential backoff where that may help, within a budget of answers.

A question that fails while others are answered has a number of retries. An endpoint that answers nobody is waited for
as a whole, so that a run outlasts its restart; after that its questions fail at once, until it answers again.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from lockstep.rl.verifiers.llm_judge.client import ChatClient, EndpointError, Message, Reply
from lockstep.rl.verifiers.llm_judge.config import LLMJudgeConfig

LONGEST_PAUSE_S = 60.0
"""Of the backoff, which begins with a second; an endpoint may ask for longer pauses by Retry-After."""


class BudgetSpent(EndpointError):
    """As many answers as the budget has were given."""


class Endpoint:
    """Completes conversations for the coroutines of one event loop, between `open` and `close`."""

    def __init__(
        self,
        config: LLMJudgeConfig,
        budget: int = 0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            budget: answers at most; 0 for as many as it takes.

        Raises:
            EndpointError: where the variable of the API key is not set.
        """
        self._config, self._budget, self._sleep, self._clock = config, budget, sleep, clock
        self._client = ChatClient(config)
        self.open, self.close = self._client.open, self._client.close
        self._slots = asyncio.Semaphore(config.concurrent)
        self._away_since: float | None = None
        self._costly = 0
        self.answers, self.tokens = 0, 0
        """How many answers came, and the tokens that they and their questions have, as the endpoint counts them."""

    async def complete(self, messages: Sequence[Message]) -> Reply:
        """The model's answer to a conversation.

        Raises:
            EndpointError: when it has none after all retries, or the budget is spent.
        """
        failures, answers, pauses = 0, self.answers, 0
        while True:
            try:
                return await self._once(messages)
            except EndpointError as error:
                failures += not error.away or self.answers > answers
                pause = max(error.pause, min(LONGEST_PAUSE_S, 2.0 ** min(pauses, 6))) * random.uniform(1.0, 1.5)
                if not error.again or failures > self._config.retries or self._is_too_long(pause, error):
                    raise
                answers, pauses = self.answers, pauses + 1
                await self._sleep(pause)

    def _is_too_long(self, pause: float, error: EndpointError) -> bool:
        """Whether the endpoint will have answered nobody, or asks to wait, for longer than it is waited for."""
        since = self._clock() if self._away_since is None or not error.away else self._away_since
        waits = error.away or error.pause > 0
        return waits and self._clock() + pause - since > self._config.patience_s

    async def _once(self, messages: Sequence[Message]) -> Reply:
        async with self._slots:
            self._spend()
            try:
                reply = await self._client.complete(messages)
            except EndpointError as error:
                if not error.cost:
                    self._costly -= 1
                if error.away and self._away_since is None:
                    self._away_since = self._clock()
                raise
            self.answers, self.tokens, self._away_since = self.answers + 1, self.tokens + reply.tokens, None
            return reply

    def _spend(self) -> None:
        """Counts an answer before it is asked for, so that those that are open at one time stay within the budget."""
        if self._budget and self._costly >= self._budget:
            raise BudgetSpent(f"the budget of {self._budget} answers is spent: raise verifier.llm_judge.budget")
        self._costly += 1
