"""Assembles the tokens that an engine returns, pass by pass, into completions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lockstep.data.batch import Column
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.detokenizer import before_stop
from lockstep.rl.rollout.protocol import Engine, FailedOutput, OnOverflow, Request, TokenOutput
from lockstep.rl.types import Completion, Prompt, Rollout, continued


@dataclass(frozen=True)
class RolloutRequest:
    """A request for one completion of a prompt, which may continue earlier turns."""

    number: int
    """Identifies the completion; with the seed and the position it decides what is drawn."""
    tokens: tuple[int, ...]
    """Of the prompt."""
    sampling: SamplingParams
    seed: int
    begun: Completion | None = None
    """The completion so far, with the turns of its environment; the model goes on behind it."""
    on_overflow: OnOverflow = "error"
    """What becomes of it where prompt and completion are too long."""

    @property
    def request(self) -> Request:
        """The request to an engine, in which the completion so far belongs to the tokens."""
        if self.begun is None:
            return Request(
                self.number, self.tokens, self.sampling, self.seed, self.number, on_overflow=self.on_overflow
            )
        before, limits = len(self.begun.tokens), self.sampling
        left = {
            "max_new_tokens": limits.max_new_tokens - before,
            "min_new_tokens": max(0, limits.min_new_tokens - before),
        }
        tokens = self.tokens + self.begun.tokens
        return Request(self.number, tokens, limits.model_copy(update=left), self.seed, self.number, before)


@dataclass(frozen=True)
class Written:
    """What a rollout engine has written since it was last asked."""

    completions: list[Completion] = field(default_factory=list)
    """Those that have ended."""
    tokens: int = 0
    """All that were drawn, of completions that go on, too."""
    seconds: float = 0.0
    """In which it computed."""
    proposed: int = 0
    """Tokens that it computed on trial; see `rollout.speculate`."""
    accepted: int = 0
    """Those of them that were drawn then."""


class CompletionFailed(ValueError):
    """A completion that an engine could not compute, which its model or its options are to blame for."""


class OutputProcessor:
    """Requests that an engine works on, and the tokens that each has so far."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._requests: dict[int, RolloutRequest] = {}
        self._parts: dict[str | int, list[TokenOutput]] = {}

    @property
    def has_work(self) -> bool:
        """Whether a request is not complete."""
        return bool(self._requests)

    def add(self, request: RolloutRequest) -> None:
        """Add a request to the engine.

        Raises:
            PromptTooLong, ValueError: see `Engine.add`.
        """
        self._engine.add(request.request)
        self._requests[request.number], self._parts[request.number] = request, []

    def step(self) -> list[Completion]:
        """Run one forward pass; returns the completions that ended with it, had failed or had been cancelled."""
        errors: dict[str | int, str] = {}
        for output in self._engine.step():
            if isinstance(output, FailedOutput):
                errors[output.key] = output.reason
            if isinstance(output, TokenOutput):
                self._parts[output.key].append(output)
        ended = [number for number in self._requests if not self._engine.holds(number)]
        return [self._completed(number, errors.get(number, "")) for number in ended]

    def drop(self) -> None:
        """Cancel all requests."""
        for number in self._requests:
            self._engine.cancel(number)
        self._requests, self._parts = {}, {}

    def _completed(self, number: int, error: str) -> Completion:
        request, tokens = self._requests.pop(number), self._parts.pop(number)
        ids = [t.token for t in tokens]
        reason = "error" if error else (tokens and tokens[-1].finish_reason) or "abort"
        text = "" if error else self._engine.decode(ids)
        written = Completion(
            sample=number,
            tokens=Column(ids, np.int32),
            logp=Column((t.logp for t in tokens), np.float32),
            text=before_stop(text, request.sampling.stop) if reason == "stop" else text,
            finish_reason=reason,
            weight_versions=Column((t.weight_version for t in tokens), np.int32),
            sampling_logp=Column((t.sampling_logp for t in tokens), np.float32),
            supports=tuple(t.support for t in tokens) if any(t.support for t in tokens) else (),
            experts=tokens[-1].experts if tokens else None,
            error=error,
        )
        if request.begun is None or error:
            return written
        return continued(request.begun, written, self._engine.decode)


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    samples: int,
    seed: int,
    on_overflow: OnOverflow = "error",
) -> Iterator[Rollout]:
    """Generate `samples` completions of each prompt, each yielded as soon as it ends; the engine must be idle.

    Sample s of the prompt with index i has the number i · samples + s, which is also its key, and is drawn from
    random numbers that depend on (seed, that number, position) only.

    Raises:
        PromptTooLong: before anything runs.
        CompletionFailed: when one of them cannot be computed.
    """
    assert not engine.has_work
    numbered = [(prompt.index * samples + s, prompt) for prompt in prompts for s in range(samples)]
    prompt_of = dict(numbered)
    requests = [RolloutRequest(n, p.tokens, sampling, seed, on_overflow=on_overflow) for n, p in numbered]
    for each in requests:
        engine.check(each.request)
    processor = OutputProcessor(engine)
    for each in requests:
        processor.add(each)
    try:
        while processor.has_work:
            yield from (_whole(each).with_prompt(prompt_of[each.sample]) for each in processor.step())
    finally:
        processor.drop()


def _whole(completion: Completion) -> Completion:
    if completion.error:
        raise CompletionFailed(f"completion {completion.sample} cannot be written: {completion.error}")
    return completion
