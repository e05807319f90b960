"""EnvironmentWorker: plays the episodes of many rollouts at a time, on an asyncio event loop of their own.

The actor's calls run on another event loop than the episodes, so that an environment that blocks its loop meets the
deadline like one that is only slow. Whatever an environment does wrong makes its rollout ungradable.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from threading import Thread
from typing import Any, TypeVar

from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.environments.config import EnvironmentConfig
from lockstep.rl.environments.factory import opened
from lockstep.rl.environments.protocol import Environment, EnvironmentResponse, Message, Turn
from lockstep.rl.environments.tool_calls import ChatForm
from lockstep.rl.types import Rollout, last_turn, turns
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.workers.base import Worker

_Result = TypeVar("_Result")


class EpisodeLost(RuntimeError):
    """The rollout's episode began in a process that has died."""


class EnvironmentWorker(Worker):
    """Steps environments, one for each rollout; an episode is closed when it ends, fails or is dropped."""

    role = "environment"

    def __init__(
        self,
        rank: int,
        config: EnvironmentConfig,
        files: dict[str, str],
        chat: bool,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            files: contents of the policy's tokenizer files, by name.
            chat: whether prompts are in the tokenizer's chat template.
            chat_template_kwargs: variables of that template.

        Raises:
            BadTokenizer, BadTemplate, NoEnvironment, SandboxError: where no episode could begin.
        """
        super().__init__(rank)
        self._config, self._tokenizer = config, Tokenizer(files, chat_template_kwargs)
        self._form = ChatForm(self._tokenizer, chat=chat)
        self._form.answer((), [Message("tool", "")])
        self._shared = ExitStack()
        self._open = self._shared.enter_context(opened(config))
        self._episodes: dict[int, Environment] = {}
        self._loop = asyncio.new_event_loop()
        self._running: set[Future[Any]] = set()
        Thread(target=self._loop.run_forever, daemon=True, name="episodes").start()

    async def answer(self, rollout: Rollout, most: int) -> EnvironmentResponse:
        """Steps the rollout's environment with the model's last turn, within the deadline.

        Args:
            most: tokens that the whole completion may have.

        Returns:
            The tokens that follow the turn, or the end of the episode, ungradable where the environment failed.
        """
        try:
            answer = await self._inside(self._answered(rollout, most))
        except EpisodeLost:
            return EnvironmentResponse(is_lost=True)
        except TimeoutError:
            answer = _failed(f"the environment did not answer within {self._config.deadline} s")
        except asyncio.CancelledError:
            answer = _failed("the rollout was dropped")
        except Exception as error:
            answer = _failed(f"the environment raised {type(error).__name__}: {error}")
        if not answer.tokens:
            await self._close(rollout.sample)
        return answer

    async def drop(self) -> None:
        """Cancels all steps that run and closes all episodes."""
        for future in list(self._running):
            future.cancel()
        await asyncio.gather(*map(self._close, list(self._episodes)))

    async def close(self) -> None:
        """Drops all episodes and closes what they share."""
        await self.drop()
        self._shared.close()

    async def _inside(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Runs a coroutine on the episodes' loop. Raises TimeoutError where it takes longer than the deadline."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._running.add(future)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._config.deadline)
        finally:
            self._running.discard(future)

    async def _answered(self, rollout: Rollout, most: int) -> EnvironmentResponse:
        said, number = last_turn(rollout), turns(rollout)
        turn = Turn(
            self._tokenizer.decode(said),
            number,
            last=number >= self._config.turns,
            whole=rollout.finish_reason == "stop",
        )
        reply = await (await self._episode(rollout, number)).step(turn)
        ended = EnvironmentResponse(verdict=reply.verdict, final=turn.text)
        if not reply.messages or not turn.whole:
            return ended
        if turn.last:
            return replace(ended, finish_reason="turns")
        tokens = tuple(self._form.answer(said, reply.messages))
        return (
            EnvironmentResponse(tokens)
            if len(rollout.tokens) + len(tokens) < most
            else replace(ended, finish_reason="length")
        )

    async def _episode(self, rollout: Rollout, number: int) -> Environment:
        if number > 1:
            if rollout.sample not in self._episodes:
                raise EpisodeLost("its episode was in a process that died")
            return self._episodes[rollout.sample]
        self._episodes[rollout.sample] = environment = self._open()
        await environment.reset(rollout.prompt)
        return environment

    async def _close(self, number: int) -> None:
        environment = self._episodes.pop(number, None)
        if environment is not None:
            try:
                await self._inside(environment.close())
            except Exception as error:
                self.log.warning("an environment did not close: %s: %s", type(error).__name__, error)


def _failed(reason: str) -> EnvironmentResponse:
    return EnvironmentResponse(verdict=Verdict(Outcome.ungradable, reason[:500]))
