"""The rollout engine of this package: continuous batching on a transformer, and weight updates while requests run.

A sequence that ends makes room at once for one that waits.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice, zip_longest
from types import MappingProxyType

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lockstep.distributed.checkpoint.tensors import digest, to_numpy
from lockstep.distributed.device import give_back
from lockstep.model.attention.kv_cache import kinds
from lockstep.model.attention.paged_kernel import BLOCK
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.config import EngineConfig, check_recordable
from lockstep.rl.rollout.model_runner import ModelRunner, block_counts
from lockstep.rl.rollout.protocol import (
    Clause,
    FailedOutput,
    Output,
    PromptTooLong,
    Request,
    Score,
    Statistics,
    TokenOutput,
)
from lockstep.rl.rollout.requests import check_request, fitted, prepared
from lockstep.rl.rollout.retry import one_by_one
from lockstep.rl.rollout.routing_record import RoutingRecord, recorded
from lockstep.rl.rollout.sampling.draws import Drawn, next_token
from lockstep.rl.rollout.sampling.parallel_sampler import ParallelSampler
from lockstep.rl.rollout.sampling.prompt_scorer import PromptScorer
from lockstep.rl.rollout.scheduling.block_pool import BlockPool
from lockstep.rl.rollout.scheduling.plan import Failures, Plan, SequenceState
from lockstep.rl.rollout.scheduling.scheduler import Scheduler
from lockstep.rl.weight_sync.parameters import poisoned
from lockstep.rl.weight_sync.protocol import Shard
from lockstep.rl.weight_sync.receiver import Receiver

log = logging.getLogger(__name__)

DEFAULTS = EngineConfig()


class RolloutEngine:
    """Implements `Engine` on a transformer; each rank of a tensor group has one, and all make the same calls."""

    exceptions: frozenset[Clause] = frozenset()

    def __init__(
        self,
        transformer: Transformer,
        config: EngineConfig = DEFAULTS,
        *,
        decode: Callable[[list[int]], str],
        special: Mapping[int, str] = MappingProxyType({}),
        blocks: Sequence[int] | None = None,
        records_routing: bool = False,
    ) -> None:
        """
        Args:
            config: the model's context bounds its length; the KV cache is allocated by the first pass.
            decode: tokens to text, for stop strings and `Rollout.text`.
            special: names of tokens that are no text; a stop string that is one ends completions at this token.
            blocks: of the KV cache, for each kind of layer (see `kv_cache.kinds`), instead of what `cache_gib` allows.
            records_routing: whether completions come with the experts of all their tokens; see `TokenOutput.experts`.

        Raises:
            ValueError: when a model has no experts that could be recorded.
        """
        if records_routing:
            check_recordable(transformer.model)
        self.transformer, self.decode, self._special = transformer, decode, special
        self.length, self._on_update = min(config.length, transformer.model.context), config.on_update
        counts = blocks or block_counts(transformer, config)
        self.runner = ModelRunner(transformer, counts, records=records_routing)
        self._record = RoutingRecord(counts[0]) if records_routing else None
        self._sampler = ParallelSampler(transformer)
        self._scorer = PromptScorer(self.runner, self._sampler)
        pools = [BlockPool(count) for count in counts]
        limits = {"sequences": config.sequences, "budget": config.budget, "speculate": config.speculate}
        self._scheduler = Scheduler(kinds(transformer.model), pools, **limits)
        self._sequences: dict[str | int, SequenceState] = {}
        self.weight_version = 0
        self._receiver: Receiver | None = None
        self._given_back: dict[nn.Parameter, torch.Size] = {}
        self._coming = 0
        self._prompt_tokens = self._generated_tokens = 0

    def receive(self, version: int, shards: Sequence[Shard]) -> None:
        """Replace all weights by those in one message.

        Raises:
            WeightsDiffer: when a tensor is missing or its bits differ.
        """
        self.begin_update(version)
        self.take(shards)
        self.end_update()

    def agree(self, number: int) -> int:
        """The number of the first tensor rank, on all of them, which call this together."""
        group = self.transformer.groups.tensor
        if group.size() == 1:
            return number
        said = torch.tensor(number)
        dist.broadcast(said, dist.get_global_rank(group, 0), group)
        return int(said)

    def ready_for_update(self) -> bool:
        """Whether `begin_update` may be called; with `on_update="finish"` waiting requests begin after the update."""
        self._scheduler.admits = self._on_update != "finish"
        return self._scheduler.admits or not self._scheduler.running

    def begin_update(self, version: int) -> None:
        """Begin to replace all weights: they are NaN until `take` has filled them, and `end_update` puts them to use.

        Raises:
            RuntimeError: while requests run that have to end under the old weights.
        """
        if not self.ready_for_update():
            raise RuntimeError("requests are to end under the old weights first: step until ready_for_update")
        for parameter, shape in self._given_back.items():
            parameter.data = parameter.data.new_empty(shape)
        self._given_back = {}
        self._receiver, self._coming = Receiver(poisoned(self.transformer)), version

    def take(self, shards: Sequence[Shard]) -> None:
        """Write a part of the new weights; shards may come from any layout, in messages of any size.

        Raises:
            WeightsDiffer: when bits differ from those that the policy signed.
        """
        assert self._receiver is not None
        self._receiver.take(shards)

    def end_update(self) -> None:
        """Use the new weights from the next step on; running requests go on as `on_update` says.

        Raises:
            WeightsDiffer: when a tensor is missing.
        """
        assert self._receiver is not None
        self._receiver.close()
        self._receiver = None
        self.runner.pack()
        self.weight_version = self._coming
        self._scheduler.admits = True
        if self._on_update == "pause":
            self._scheduler.forget()
        else:
            self._scheduler.restart()

    def forget(self) -> None:
        """Empty the prefix cache: no request finds what earlier ones have computed."""
        self._scheduler.forget()

    def release(self, *, weights: bool = False) -> None:
        """Free the memory of the KV cache; running requests are computed again when they go on.

        Args:
            weights: free that of the weights as well; an update has to come before the next step.
        """
        self._scheduler.restart()
        self.runner.release()
        if weights and not self._given_back:
            self._given_back = {parameter: parameter.shape for parameter in self.transformer.parameters()}
            self.transformer.unpack()
            for parameter in self._given_back:
                parameter.data = parameter.data.new_empty(0)
        give_back(self.runner.device)

    def weights_digest(self) -> str:
        """Digest of this rank's weights: equal where all bits are equal."""
        return digest(np.array([digest(to_numpy(parameter)) for parameter in self.transformer.parameters()]))

    @property
    def has_work(self) -> bool:
        """Whether a request has neither ended nor been cancelled."""
        return bool(self._sequences)

    @property
    def statistics(self) -> Statistics:
        """Requests, cache and tokens at this moment."""
        scheduler = self._scheduler
        free = sum(pool.free for pool in scheduler.pools)
        return Statistics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_used=sum(pool.count for pool in scheduler.pools) - free,
            blocks_free=free,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=scheduler.found,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.preemptions,
            proposed_tokens=scheduler.proposed,
            accepted_tokens=scheduler.accepted,
        )

    @property
    def longest(self) -> int:
        """The most tokens that prompt and completion together may have: context and cache have room for them."""
        lengths = range(1, self.length + 1)
        return bisect_left(lengths, True, key=lambda length: self._scheduler.lacking(length - 1) is not None)

    def check(self, request: Request) -> None:
        """Refuse a request that can never run; raises what `Engine.check` names."""
        self._fitted(request)

    def _fitted(self, request: Request) -> Request:
        """The request as it runs; raises what `Engine.check` names."""
        rolls = request.on_overflow == "roll"
        if rolls and self._record:
            raise ValueError("a window that rolls goes to experts anew at each token: record none, or do not roll")
        request = fitted(request, self.length)
        model, prompt = self.transformer.model, len(request.tokens)
        ends = self._sampler.ends(request.sampling)
        check_request(request, length=self.length, vocabulary=model.vocabulary, ends=ends)
        needed = prompt + max(0, request.new - 1)
        lacking = self._scheduler.lacking(min(needed, self.length) if rolls else needed)
        if lacking:
            raise PromptTooLong(
                f"a prompt of {prompt} tokens and {request.new} new ones need {lacking[0]} blocks of {BLOCK} tokens, "
                f"and the cache has {lacking[1]}: raise cache_gib, or ask for fewer tokens"
            )
        return request

    def add(self, request: Request) -> None:
        """Queue a request, which runs as soon as there is room.

        Raises:
            PromptTooLong: when prompt and completion do not fit into the context or the cache.
            ValueError: when the prompt is empty, a token is not in the vocabulary, or the key is in use.
        """
        request = self._fitted(request)
        request, stops = prepared(request, self._sequences, self._special, self.decode)
        scores: list[Score] | None = None if request.prompt_logprobs is None else []
        grammar = request.grammar.begin() if request.grammar else None
        sequence = SequenceState(request, stops=stops, scores=scores, grammar=grammar)
        self._sequences[request.key] = sequence
        self._scheduler.waiting.append(sequence)
        self._prompt_tokens += len(request.tokens)

    def cancel(self, key: str | int) -> None:
        """Abort a request: `step` returns no more of its tokens. One that has ended or was never added is no error."""
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self._scheduler.finish(sequence)

    def holds(self, key: str | int) -> bool:
        """Whether a request was added and has neither ended nor been cancelled."""
        return key in self._sequences

    def step(self) -> list[Output]:
        """Run one forward pass; returns the tokens that it drew, prompts and failures.

        Several tokens of one request stand in the order of their places.
        After an error no request is lost: the next step computes again what was running.

        Raises:
            RuntimeError: between `begin_update` and `end_update`, or after `release` of the weights.
        """
        if self._receiver is not None:
            raise RuntimeError(f"weights of version {self._coming} have come in part only: end the update first")
        if self._given_back:
            raise RuntimeError("the weights have been given back: update them first")
        try:
            with torch.inference_mode():
                return self._stepped(self._scheduler.plan())
        except BaseException:
            self._scheduler.restart()
            raise

    def _stepped(self, plan: Plan) -> list[Output]:
        """Run a pass; where it raises, and no other rank waits for this one, see `one_by_one`."""
        try:
            passed = self._passed(plan)
        except Exception as error:
            if self.transformer.groups.tensor.size() > 1:
                raise
            return one_by_one(error, self._scheduler, self.runner, self._alone, self._failed)
        return self._outputs(plan, *passed)

    def _alone(self, plan: Plan) -> list[Output]:
        return self._outputs(plan, *self._passed(plan))

    def _passed(self, plan: Plan) -> tuple[Tensor | None, list[Drawn | Exception]]:
        """Compute a plan: activations of its tokens, and what is drawn; nobody's state changes but the cache's."""
        if not plan.chunks:
            return None, []
        computed = self.runner.run(plan)
        drawn = [] if computed.logits_BV is None else self._sampler(plan.rows, computed.logits_BV)
        if self._record and computed.experts_TLK is not None:
            self._record.computed(plan, computed.experts_TLK)
        return computed.hidden_TD, drawn

    def _outputs(self, plan: Plan, hidden_TD: Tensor | None, drawn: Sequence[Drawn | Exception]) -> list[Output]:
        """Add what was computed to the sequences, and end those that end with it."""
        failures, found = Failures(), list[Output]()
        if hidden_TD is not None:
            found += self._scorer(plan.chunks, hidden_TD, failures)
        found += self._extended(plan, drawn, failures)
        if self._record:
            self._record.follow(plan)
        ended = [self._ended(output) if output.finish_reason else output for output in found]
        return ended + [self._failed(*failure) for failure in failures.items()]

    def _ended(self, output: Output) -> Output:
        """Release a sequence with its last output, which gets what was recorded of the sequence."""
        sequence = self._sequences.pop(output.key)
        self._scheduler.finish(sequence)
        if self._record and isinstance(output, TokenOutput):
            return replace(output, experts=recorded(sequence))
        return output

    def _extended(self, plan: Plan, drawn: Sequence[Drawn | Exception], failures: Failures) -> list[Output]:
        """Add drawn tokens to each sequence; one that fails with tokens on trial is computed again without them."""
        found, rows = list[Output](), iter(drawn)
        for sequence, proposed in plan.drawing:
            own = list(islice(rows, len(proposed) + 1))
            if proposed and (sequence in failures or any(isinstance(each, Exception) for each in own)):
                failures.pop(sequence, None)
                self.runner.clear(self._scheduler.redo(sequence))
                continue
            try:
                if sequence not in failures:
                    self._extend(sequence, proposed, own, found)
            except Exception as error:
                failures[sequence] = error
        self._generated_tokens += len(found)
        return found

    def _extend(
        self, sequence: SequenceState, proposed: Sequence[int], drawn: Sequence[Drawn | Exception], found: list[Output]
    ) -> None:
        """Add drawn tokens to a sequence, up to the first that is not the one on trial in its place, or ends it."""
        ends = self._sampler.ends(sequence.request.sampling)
        for each, trial in zip_longest(drawn, proposed):
            output = next_token(sequence, each, ends, self.weight_version)
            found.append(output)
            if output.finish_reason or output.token != trial:
                break
        if proposed:
            self._scheduler.settle(sequence, len(proposed))
        if sequence.known > self.length and not found[-1].finish_reason:
            self._scheduler.roll(sequence)

    def _failed(self, sequence: SequenceState, error: Exception) -> FailedOutput:
        """End a sequence that cannot go on; what it leaves in the cache is overwritten, lest it spread."""
        key = sequence.request.key
        if not isinstance(error, FloatingPointError):
            log.error("the request %s failed", key, exc_info=error)
        del self._sequences[key]
        self.runner.clear(self._scheduler.discard(sequence))
        return FailedOutput(key, str(error) or type(error).__name__)
