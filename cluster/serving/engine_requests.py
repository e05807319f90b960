"""Turns request bodies into requests of the engine: prompts as tokens, with sampling parameters and a seed."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from lockstep.cluster.serving.errors import Refused
from lockstep.cluster.serving.protocol import Body, ChatBody, CompletionBody
from lockstep.data.chat_template import BadTemplate, RefusedChat
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.protocol import Request

COMPLETION_TOKENS = 16
"""OpenAI's default for completions; a chat's answer may fill the context."""


@dataclass(frozen=True)
class EngineRequests:
    """The prompts of one request body, and how completions of them are sampled."""

    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    samples: int
    seed: int
    echoes: Sequence[str] = ()
    """Text of each prompt that its completions begin with, where the body asks for `echo`."""
    draws: bool = True
    """Whether tokens are drawn: a limit of 0 asks for none."""
    prompt_logprobs: int | None = None
    """Of the likeliest tokens at each place of a prompt that is to be scored."""

    def requests(self, id: str) -> list[Request]:
        """Requests for the engine; those of one prompt are adjacent, so that the prompt is computed once."""
        prompts = [tuple(prompt) for prompt in self.prompts for _ in range(self.samples)]
        scores, draws = self.prompt_logprobs, self.draws
        return [
            Request(f"{id}/{i}", prompt, self.sampling, self.seed, i, prompt_logprobs=scores, draws=draws)
            for i, prompt in enumerate(prompts)
        ]


@dataclass(frozen=True)
class RequestMaker:
    """Converts and checks request bodies for one engine."""

    tokenizer: Tokenizer
    longest: int
    """The most tokens that a prompt and its completion together may have."""
    places: int
    """Number of completions that may run and wait."""

    def completion(self, body: CompletionBody) -> EngineRequests:
        """Convert a body of `/v1/completions`.

        Raises:
            Refused: names the field that is wrong.
        """
        self._check_number(body, len(body.prompts))
        encode, decode = self.tokenizer.encode_prompt, partial(self.tokenizer.decode, skip_special=False)
        limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        prompts = [encode(p) if isinstance(p, str) else p for p in body.prompts]
        for prompt in prompts:
            self._check(prompt, "prompt", limit)
        job = self._job(body, prompts, limit, body.logprobs or 0)
        if not body.echo:
            return job
        texts = [p if isinstance(p, str) else decode(p) for p in body.prompts]
        return replace(job, echoes=texts, prompt_logprobs=body.logprobs)

    def chat(self, body: ChatBody) -> EngineRequests:
        """Convert a body of `/v1/chat/completions`.

        Raises:
            Refused: names the field that is wrong.
        """
        self._check_number(body, 1)
        try:
            prompt = self.tokenizer.encode_chat([message.plain for message in body.messages])
        except (BadTemplate, RefusedChat) as error:
            raise Refused(400, str(error), param="messages") from error
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        self._check(prompt, "messages", 1 if asked is None else asked)
        limit = self.longest - len(prompt) if asked is None else asked
        return self._job(body, [prompt], limit, body.top_logprobs or 0)

    def _check_number(self, body: Body, prompts: int) -> None:
        wanted = prompts * body.samples
        if wanted > self.places:
            raise Refused(400, f"{wanted} completions are too many: {self.places} may run and wait", param="n")

    def _check(self, prompt: Sequence[int], param: str, limit: int) -> None:
        if not prompt:
            raise Refused(400, f"{param} has no tokens: give at least one", param=param)
        if len(prompt) + min(limit, 1) > self.longest:
            raise Refused(
                400,
                f"{param} has {len(prompt)} tokens, and it and its completion may have {self.longest}: shorten it",
                param=param,
                code="context_length_exceeded",
            )

    def _job(self, body: Body, prompts: Sequence[Sequence[int]], limit: int, logprobs: int) -> EngineRequests:
        seed = secrets.randbits(63) if body.seed is None else body.seed
        return EngineRequests(prompts, body.sampling(max(1, limit), logprobs), body.samples, seed, draws=limit > 0)
