"""EnvironmentWorker: plays the episodes of many rollouts at a time, on an asyncio event loop of their own.

The actor's calls run on another event loop than the episodes, so that an environment that blocks its loop meets the
deadline like one that is only slow. Whatever an environment does wrong makes its rollout ungradable.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from threading import Thread
from typing import Any, TypeVar

import numpy as np

from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.environments.chat_form import ChatForm
from lockstep.rl.environments.config import EnvironmentConfig
from lockstep.rl.environments.factory import opened
from lockstep.rl.environments.protocol import (
    Environment,
    EnvironmentResponse,
    FirstSpeaker,
    Message,
    Reply,
    Turn,
)
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
        self._speaks_first = isinstance(self._open(), FirstSpeaker)
        if self._speaks_first:
            self._form.first_observation([Message("user", "")])
        self._episodes: dict[int, Environment] = {}
        self._loop = asyncio.new_event_loop()
        self._running: set[Future[Any]] = set()
        Thread(target=self._loop.run_forever, daemon=True, name="episodes").start()

    def speaks_first(self) -> bool:
        """Whether environments have a first observation, which the model reads before its first turn."""
        return self._speaks_first

    async def begin(self, rollout: Rollout, seed: int, most: int) -> EnvironmentResponse:
        """Opens the environment of a rollout that has no tokens and asks for its first observation, as `answer` does.

        Args:
            seed: of the request; with the rollout's number it is that of the environment.
        """
        return await self._guarded(rollout.sample, self._begun(rollout, seed, most))

    async def answer(self, rollout: Rollout, most: int) -> EnvironmentResponse:
        """Steps the rollout's environment with the model's last turn, within the deadline.

        Args:
            most: tokens that the whole completion may have.

        Returns:
            The tokens that follow the turn, or the end of the episode, ungradable where the environment failed.
        """
        return await self._guarded(rollout.sample, self._answered(rollout, most))

    async def end(self, sample: int) -> None:
        """Closes the episode of a rollout that does not go on."""
        await self._close(sample)

    async def _guarded(self, sample: int, work: Coroutine[Any, Any, EnvironmentResponse]) -> EnvironmentResponse:
        """The answer of an environment, or what is to be said where it fails; closes an episode that has ended."""
        try:
            answer = await self._inside(work)
        except EpisodeLost:
            return EnvironmentResponse(is_lost=True)
        except TimeoutError:
            answer = _failed(f"the environment did not answer within {self._config.deadline} s")
        except asyncio.CancelledError:
            answer = _failed("the rollout was dropped")
        except Exception as error:
            answer = _failed(f"the environment raised {type(error).__name__}: {error}")
        if not answer.tokens:
            await self._close(sample)
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
        begun = number > 1 or rollout.written[:1] == (False,)
        environment = self._episode(rollout.sample) if begun else await self._new(rollout)
        reply = await environment.step(turn)
        ended = EnvironmentResponse(verdict=reply.verdict, final=turn.text)
        if not reply.messages or not turn.whole:
            return ended
        if turn.last:
            return replace(ended, finish_reason="turns")
        return _within(most - len(rollout.tokens), self._form.answer(said, reply.messages), ended)

    async def _begun(self, rollout: Rollout, seed: int, most: int) -> EnvironmentResponse:
        environment = await self._new(rollout)
        assert isinstance(environment, FirstSpeaker)
        reply: Reply = await environment.first_observation(_seed(seed, rollout.sample))
        ended = EnvironmentResponse(verdict=reply.verdict)
        return _within(most, self._form.first_observation(reply.messages), ended) if reply.messages else ended

    async def _new(self, rollout: Rollout) -> Environment:
        self._episodes[rollout.sample] = environment = self._open()
        await environment.reset(rollout.prompt)
        return environment

    def _episode(self, sample: int) -> Environment:
        if sample not in self._episodes:
            raise EpisodeLost("its episode was in a process that died")
        return self._episodes[sample]

    async def _close(self, number: int) -> None:
        environment = self._episodes.pop(number, None)
        if environment is not None:
            try:
                await self._inside(environment.close())
            except Exception as error:
                self.log.warning("an environment did not close: %s: %s", type(error).__name__, error)


def _within(room: int, tokens: Sequence[int], ended: EnvironmentResponse) -> EnvironmentResponse:
    """Tokens that the model goes on behind, or the end of the episode where they leave it no room for one more."""
    return EnvironmentResponse(tuple(tokens)) if len(tokens) < room else replace(ended, finish_reason="length")


def _seed(seed: int, sample: int) -> int:
    """Of a sample's environment: a function of the request's seed and the sample's number alone."""
    return int(np.random.default_rng([seed, sample, *b"environment"]).integers(1 << 62))


def _failed(reason: str) -> EnvironmentResponse:
    return EnvironmentResponse(verdict=Verdict(Outcome.ungradable, reason[:500]))
