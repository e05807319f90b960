"""Completions that are asked for one by one, put together from the tokens that an engine says pass by pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.detokenizer import before_stop
from lockstep.rl.rollout.protocol import Engine, Request, TokenOutput
from lockstep.rl.types import Completion, Prompt, Rollout, continued


@dataclass(frozen=True)
class RolloutRequest:
    """A completion that is wanted."""

    number: int
    """Its name; with the seed and the position it decides what is drawn."""
    tokens: tuple[int, ...]
    """Of the prompt."""
    sampling: SamplingParams
    seed: int
    begun: Completion | None = None
    """What there is of it already, of earlier turns and their answers; behind that it goes on."""

    @property
    def request(self) -> Request:
        """What the engine is asked for."""
        if self.begun is None:
            return Request(self.number, self.tokens, self.sampling, self.seed, self.number)
        before, limits = len(self.begun.tokens), self.sampling
        left = {
            "max_new_tokens": limits.max_new_tokens - before,
            "min_new_tokens": max(0, limits.min_new_tokens - before),
        }
        tokens = self.tokens + self.begun.tokens
        return Request(self.number, tokens, limits.model_copy(update=left), self.seed, self.number, before)


class OutputProcessor:
    """The orders that an engine works on, and what each has so far."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._orders: dict[int, RolloutRequest] = {}
        self._parts: dict[str | int, list[TokenOutput]] = {}

    @property
    def has_work(self) -> bool:
        """Whether an order is not complete."""
        return bool(self._orders)

    def add(self, order: RolloutRequest) -> None:
        """Take an order.

        Raises:
            PromptTooLong, ValueError: see `Engine.add`.
        """
        self._engine.add(order.request)
        self._orders[order.number], self._parts[order.number] = order, []

    def step(self) -> list[Completion]:
        """One forward pass; the completions that ended with it or were cancelled before."""
        for token in self._engine.step():
            self._parts[token.key].append(token)
        return [self._completed(number) for number in list(self._orders) if not self._engine.holds(number)]

    def drop(self) -> None:
        """Forget all orders."""
        for number in self._orders:
            self._engine.cancel(number)
        self._orders, self._parts = {}, {}

    def _completed(self, number: int) -> Completion:
        order, tokens = self._orders.pop(number), self._parts.pop(number)
        ids = tuple(t.token for t in tokens)
        text, reason = self._engine.decode(list(ids)), (tokens and tokens[-1].finish_reason) or "abort"
        written = Completion(
            sample=number,
            tokens=ids,
            logp=tuple(t.logp for t in tokens),
            text=before_stop(text, order.sampling.stop) if reason == "stop" else text,
            finish_reason=reason,
            weight_versions=tuple(t.weight_version for t in tokens),
            sampling_logp=tuple(t.sampling_logp for t in tokens),
            supports=tuple(t.support for t in tokens) if any(t.support for t in tokens) else (),
        )
        return written if order.begun is None else continued(order.begun, written, self._engine.decode)


def generate(
    engine: Engine, prompts: Sequence[Prompt], sampling: SamplingParams, *, samples: int, seed: int
) -> Iterator[Rollout]:
    """`samples` completions of each prompt, each as soon as it ends; the engine may have nothing else to do.

    Sample s of the prompt with index i has the number i · samples + s, which is also its key, and is drawn from
    random numbers that depend on (seed, that number, position) only.

    Raises:
        PromptTooLong: before anything runs.
    """
    assert not engine.has_work
    prompt_of = {prompt.index * samples + s: prompt for prompt in prompts for s in range(samples)}
    requests = [RolloutRequest(number, prompt.tokens, sampling, seed) for number, prompt in prompt_of.items()]
    for each in requests:
        engine.check(each.request)
    processor = OutputProcessor(engine)
    for each in requests:
        processor.add(each)
    try:
        while processor.has_work:
            yield from (each.with_prompt(prompt_of[each.sample]) for each in processor.step())
    finally:
        processor.drop()
