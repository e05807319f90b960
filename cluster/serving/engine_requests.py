"""Turns request bodies into requests of the engine: prompts as tokens, with sampling parameters and a seed."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from lockstep.cluster.serving.errors import Refused
from lockstep.cluster.serving.protocol import Body, ChatBody, CompletionBody
from lockstep.cluster.serving.structured.tools import check_shows_results
from lockstep.data.chat_template import BadTemplate, RefusedChat
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.grammar import BadGrammar, Grammar, GrammarCompiler
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
    grammar: Grammar | None = None
    """What completions are written in."""

    def requests(self, id: str) -> list[Request]:
        """Requests for the engine; those of one prompt are adjacent, so that the prompt is computed once."""
        prompts = [tuple(prompt) for prompt in self.prompts for _ in range(self.samples)]
        common = partial(Request, prompt_logprobs=self.prompt_logprobs, draws=self.draws, grammar=self.grammar)
        return [common(f"{id}/{i}", prompt, self.sampling, self.seed, i) for i, prompt in enumerate(prompts)]


@dataclass(frozen=True)
class RequestMaker:
    """Converts and checks request bodies for one engine."""

    tokenizer: Tokenizer
    longest: int
    """The most tokens that a prompt and its completion together may have."""
    places: int
    """Number of completions that may run and wait."""
    compiler: Callable[[], GrammarCompiler]
    """Makes a compiler of grammars over the tokenizer's tokens, once."""

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
        messages = [message.plain(f"messages.{i}") for i, message in enumerate(body.messages)]
        use = body.tool_use
        try:
            if use:
                use.check(self.tokenizer)
            if any(message["role"] == "tool" or "tool_calls" in message for message in messages):
                check_shows_results(self.tokenizer)
            prompt = self.tokenizer.encode_chat(messages, tools=use.of_template if use else None)
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
        sampling, grammar = body.sampling(max(1, limit), logprobs), self._grammar(body)
        return EngineRequests(prompts, sampling, body.samples, seed, draws=limit > 0, grammar=grammar)

    def _grammar(self, body: Body) -> Grammar | None:
        lark, place = body.lark
        if lark is None:
            return None
        if body.min_tokens:
            raise Refused(400, f"min_tokens and {place} cannot both be: leave one out", param="min_tokens")
        try:
            return self.compiler()(lark)
        except BadGrammar as error:
            raise Refused(400, f"{place} cannot be kept to: {error}", param=place) from error
