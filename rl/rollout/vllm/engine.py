"""The rollout engine that runs on vLLM, whose scheduler, KV cache and model it drives one pass at a time.

Requests wait here and not in vLLM, so that the adapter decides under which weights each begins. One that is to be
computed again (at new weights, after an error) is taken back from vLLM and added as a prompt with what it has written;
its next draws are the same, because they depend on (seed, sample, position). Each change of weights has a cache salt of
its own, so that nothing that old weights computed is found.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import MappingProxyType
from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from lockstep.distributed.checkpoint.tensors import Piece, Source, whole
from lockstep.rl.rollout.config import EngineConfig
from lockstep.rl.rollout.detokenizer import StopStrings
from lockstep.rl.rollout.protocol import (
    Clause,
    FailedOutput,
    Output,
    PromptOutput,
    Request,
    Statistics,
    TokenOutput,
)
from lockstep.rl.rollout.requests import check_request, finish_reason, prepared
from lockstep.rl.rollout.vllm.logits_processor import NUMBER
from lockstep.rl.rollout.vllm.model import VllmModel
from lockstep.rl.rollout.vllm.prompt_scores import asked_of_vllm, scores
from lockstep.rl.weight_sync.protocol import Shard
from lockstep.rl.weight_sync.receiver import Receiver

log = logging.getLogger(__name__)

_SALTS = count()
"""Of the prefix cache, each used by one engine under one set of weights."""


@dataclass(eq=False)
class _Sequence:
    """A request and what it has written."""

    request: Request
    stops: StopStrings | None
    tokens: list[int] = field(default_factory=list)
    number: int = -1
    """In vLLM, while it runs."""
    reported: bool = False
    """Whether what is to be said of its prompt has been said."""
    counted: bool = False
    """Whether its prompt's cached tokens have been counted."""


class VllmEngine:
    """Implements `Engine` on a model in vLLM, for one tensor rank."""

    exceptions: frozenset[Clause] = frozenset({"exact", "isolated_passes", "frees_memory", "tensor_ranks"})

    def __init__(
        self,
        model: VllmModel,
        config: EngineConfig,
        source: Source,
        *,
        decode: Callable[[list[int]], str],
        special: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            model: started with the same configuration.
            source: the weights of version 0.
            decode: tokens to text, for stop strings and `Rollout.text`.
            special: names of tokens that are no text; a stop string that is one ends completions at this token.
        """
        self.decode, self._special, self._model, self._llm = decode, special, model, model.llm
        self._places, self._on_update = config.sequences, config.on_update
        self._sequences: dict[str | int, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        self._numbers, self._salt = count(), next(_SALTS)
        self._admits, self._without_weights = True, False
        self._receiver: Receiver | None = None
        self._coming: dict[str, Tensor] = {}
        self.weight_version = self._version_coming = 0
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        model.load(model.read(source))

    @property
    def has_work(self) -> bool:
        """Whether a request has neither ended nor been cancelled."""
        return bool(self._sequences)

    @property
    def longest(self) -> int:
        """The most tokens that prompt and completion together may have; vLLM starts only with room for them."""
        return self._model.length

    @property
    def statistics(self) -> Statistics:
        """Requests, cache and tokens at this moment."""
        used = round(self._model.meter.usage * self._model.blocks) if self._running else 0
        return Statistics(
            running=len(self._running),
            waiting=len(self._waiting),
            blocks_used=used,
            blocks_free=self._model.blocks - used,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._model.meter.preemptions,
        )

    def check(self, request: Request) -> None:
        """Refuse a request that can never run; raises what `Engine.check` names."""
        if request.on_overflow != "error":
            raise ValueError(
                f"on_overflow={request.on_overflow} is of engine='lockstep', and this one has engine='vllm': use "
                "on_overflow=error"
            )
        if request.grammar is not None:
            raise ValueError("grammars are of engine='lockstep', and this one has engine='vllm': leave grammar out")
        model, ends = self._model.model, self._model.board.ends(request.sampling)
        # vLLM draws a token even where only the prompt is scored.
        length = self.longest if request.draws else self.longest - 1
        check_request(request, length=length, vocabulary=model.vocabulary, ends=ends)

    def add(self, request: Request) -> None:
        """Queue a request, which runs as soon as there is room; raises what `Engine.add` names."""
        self.check(request)
        request, stops = prepared(request, self._sequences, self._special, self.decode)
        self._sequences[request.key] = sequence = _Sequence(request, stops)
        self._waiting.append(sequence)
        self._prompt_tokens += len(request.tokens)

    def cancel(self, key: str | int) -> None:
        """Abort a request: `step` returns no more of its tokens. One that has ended or was never added is no error."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return
        if sequence.number in self._running:
            self._withdraw(sequence)
        else:
            self._waiting.remove(sequence)

    def holds(self, key: str | int) -> bool:
        """Whether a request was added and has neither ended nor been cancelled."""
        return key in self._sequences

    def step(self) -> list[Output]:
        """Run one forward pass; returns the tokens that it drew, at most one of each request, prompts and failures.

        After an error no request is lost: the next step computes again what was running.

        Raises:
            RuntimeError: between `begin_update` and `end_update`, or after `release` of the weights.
        """
        if self._receiver is not None:
            raise RuntimeError(
                f"weights of version {self._version_coming} have come in part only: end the update first"
            )
        if self._without_weights:
            raise RuntimeError("the weights have been given back: update them first")
        try:
            while self._admits and self._waiting and len(self._running) < self._places:
                self._admit(self._waiting.popleft())
            outputs = self._llm.step() if self._running else []
        except BaseException:
            self._restart(list(self._running.values()))
            raise
        return [found for output in outputs for found in self._read(output)]

    def agree(self, number: int) -> int:
        """The number itself: there is one rank."""
        return number

    def ready_for_update(self) -> bool:
        """Whether `begin_update` may be called; with `on_update="finish"` waiting requests begin after the update."""
        self._admits = self._on_update != "finish"
        return self._admits or not self._running

    def begin_update(self, version: int) -> None:
        """Begin to replace all weights; `take` assembles them in host memory, and `end_update` gives them to vLLM.

        Raises:
            RuntimeError: while requests run that have to end under the old weights.
        """
        if not self.ready_for_update():
            raise RuntimeError("requests are to end under the old weights first: step until ready_for_update")
        self._coming, self._version_coming = self._model.empty(), version
        self._receiver = Receiver((tensor, _whole(name, tensor)) for name, tensor in self._coming.items())

    def take(self, shards: Sequence[Shard]) -> None:
        """Write a part of the new weights; shards may come from any layout, in messages of any size.

        Raises:
            WeightsDiffer: when bits differ from those that the policy signed, or a part comes twice.
        """
        assert self._receiver is not None
        self._receiver.take(shards)

    def end_update(self) -> None:
        """Use the new weights from the next step on; running requests go on as `on_update` says.

        Raises:
            WeightsDiffer: when a part is missing.
        """
        assert self._receiver is not None
        self._receiver.close()
        self._model.load(self._coming.items())
        self._receiver, self._coming, self._without_weights = None, {}, False
        self.weight_version, self._admits = self._version_coming, True
        # One that pauses keeps its keys and values; a prompt that has not been computed is computed as a whole.
        pauses = self._on_update == "pause"
        self._restart([each for each in self._running.values() if not (pauses and each.tokens)])
        self.forget()

    def weights_digest(self) -> str:
        """Digest of the weights that vLLM was given: equal where all bits are equal."""
        return self._model.digest

    def forget(self) -> None:
        """Empty the prefix cache: no request finds what earlier ones have computed."""
        self._salt = next(_SALTS)

    def release(self, *, weights: bool = False) -> None:
        """Have running requests computed again; vLLM keeps the memory of its cache and weights.

        Args:
            weights: an update has to come before the next step.
        """
        self._restart(list(self._running.values()))
        self._without_weights = self._without_weights or weights

    def _admit(self, sequence: _Sequence) -> None:
        """Give a request to vLLM, with what it has written behind its prompt."""
        sequence.number = next(self._numbers)
        request, scored = sequence.request, not sequence.reported
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=max(1, request.new - len(sequence.tokens)),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            prompt_logprobs=asked_of_vllm(request, self._model.model.vocabulary) if scored else None,
            extra_args={NUMBER: sequence.number},
        )
        prompt = {"prompt_token_ids": [*request.tokens, *sequence.tokens], "cache_salt": str(self._salt)}
        self._running[sequence.number] = self._model.board.sequences[sequence.number] = sequence
        self._llm.add_request(str(sequence.number), prompt, parameters)

    def _restart(self, sequences: Sequence[_Sequence]) -> None:
        """Take requests back from vLLM, to be given to it again before those that wait."""
        for sequence in reversed(sequences):
            self._withdraw(sequence)
            self._waiting.appendleft(sequence)

    def _withdraw(self, sequence: _Sequence) -> None:
        """Take a request out of vLLM, which frees its blocks."""
        self._llm.abort_request([str(sequence.number)])
        del self._running[sequence.number], self._model.board.sequences[sequence.number]
        self._model.board.drawn.pop(sequence.number, None)

    def _read(self, output: Any) -> Iterator[Output]:
        """What an output of vLLM says of a request; one that ends with it is taken out of vLLM."""
        sequence = self._running.get(int(output.request_id))
        if sequence is None:
            return
        request = sequence.request
        if not sequence.counted:
            self._cached_tokens += output.num_cached_tokens or 0
            sequence.counted = True
        found: list[Output] = []
        if not sequence.reported and (request.prompt_logprobs is not None or not request.draws):
            found_scores = () if request.prompt_logprobs is None else scores(request, output.prompt_logprobs)
            found.append(PromptOutput(request.key, found_scores, None if request.draws else "length"))
        sequence.reported = True
        if request.draws and output.outputs[0].token_ids:
            found.append(self._token(sequence))
        if found and found[-1].finish_reason:
            self._withdraw(self._sequences.pop(request.key))
        yield from found

    def _token(self, sequence: _Sequence) -> TokenOutput | FailedOutput:
        """The token that a request drew in this pass, or why it could not."""
        request, drawn = sequence.request, self._model.board.drawn.pop(sequence.number)
        try:
            if isinstance(drawn, Exception):
                raise drawn
            sequence.tokens.append(drawn.token)
            reason = finish_reason(request, sequence.tokens, sequence.stops, self._model.board.ends(request.sampling))
        except Exception as error:
            if not isinstance(error, FloatingPointError):
                log.error("the request %s failed", request.key, exc_info=error)
            return FailedOutput(request.key, str(error) or type(error).__name__)
        self._generated_tokens += 1
        said = drawn.token, drawn.logp, drawn.sampling_logp, self.weight_version
        return TokenOutput(request.key, *said, reason, drawn.top, drawn.support)


def _whole(name: str, tensor: Tensor) -> Piece:
    """A whole logical tensor as one piece."""
    shape = tuple(tensor.shape)
    return Piece(name, shape, whole(shape), whole(shape), shape)
