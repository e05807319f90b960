"""Completions by continuous batching: a sequence that ends makes room at once for one that waits."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.groups import Groups, alone
from lockstep.model.config import ModelConfig
from lockstep.model.kv_cache import Decode, KVCache, Prefill
from lockstep.model.logprobs import local_logits
from lockstep.model.train import DTYPES, build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.sampler import draw, uniforms
from lockstep.rl.rollout.sampling import SamplingConfig
from lockstep.rl.rollout.sequence import Request, Token
from lockstep.rl.rollout.sequence import Sequence as Running
from lockstep.rl.sync import Shard, receive
from lockstep.rl.types import Prompt, Rollout


class PromptTooLong(ValueError):
    """A prompt that leaves no room for a completion."""


@dataclass(frozen=True)
class Statistics:
    """What an engine is doing, and has done since it began."""

    running: int
    waiting: int
    blocks_used: int
    blocks_free: int
    prompt_tokens: int
    """Tokens of prompts that were asked for."""
    cached_prompt_tokens: int
    """Those of them that another request had left in the cache."""
    generated_tokens: int
    preemptions: int


class RolloutEngine:
    """Draws completions from a transformer; the ranks of a tensor group each run one and make the same calls."""

    def __init__(
        self,
        transformer: Transformer,
        *,
        decode: Callable[[list[int]], str],
        length: int = 1 << 20,
        sequences: int = 64,
        cache_gib: float = 1.0,
        budget: int = 2048,
    ) -> None:
        """
        Args:
            decode: tokens to text, for stop strings and `Rollout.text`.
            length: tokens of the longest prompt and completion together; the model's context bounds it.
            sequences: completions that run at the same time.
            cache_gib: memory for keys and values; it is not taken before it is needed.
            budget: tokens that are computed in one forward pass.
        """
        model = transformer.model
        self.transformer, self._decode_text, self._prefill_tokens = transformer, decode, budget
        self._device = next(transformer.parameters()).device
        self._cache = KVCache(
            layers=model.layers,
            slots=sequences,
            length=min(length, model.context),
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=next(transformer.parameters()).dtype,
        )
        self.length = self._cache.length
        self.weight_version = 0
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._generated = self._prompted = 0
        transformer.pack()

    def receive(self, version: int, shards: Sequence[Shard]) -> None:
        """Take over new weights.

        Raises:
            WeightsDiffer: when a tensor is missing or its bits differ.
        """
        receive(self.transformer, shards)
        self.transformer.pack()
        self.weight_version = version

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._running)

    @property
    def statistics(self) -> Statistics:
        """What the engine is doing."""
        used = len(self._running)
        return Statistics(
            used, len(self._waiting), used, self._cache.slots - used, self._prompted, 0, self._generated, 0
        )

    def add(self, request: Request) -> None:
        """Take a request, to be run as soon as there is room.

        Raises:
            PromptTooLong: when prompt and completion do not fit into the context or the cache.
            ValueError: when the prompt is empty or has numbers of no token, or the key is in use.
        """
        new, prompt = request.sampling.longest, len(request.tokens)
        if prompt + new > self.length:
            raise PromptTooLong(
                f"a prompt of {prompt} tokens and {new} new ones need a context of {prompt + new}, "
                f"and rollouts have {self.length}"
            )
        self._waiting.append(Running(request))
        self._prompted += prompt

    def cancel(self, key: str | int) -> None:
        """Forget a request; one that has ended or was never there is no error. `step` says no more of it."""
        self._waiting = deque(s for s in self._waiting if s.request.key != key)
        for sequence in self._running:
            if sequence.request.key == key:
                sequence.finish_reason = "abort"
        self._drop_finished()

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One forward pass: the next tokens of the sequences that it completed, at most one for each."""
        if self._waiting and len(self._running) < self._cache.slots:
            tokens = self._admit()
        elif self._running:
            tokens = self._advance()
        else:
            return []
        self._drop_finished()
        return tokens

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, samples: int, seed: int
    ) -> Iterator[Rollout]:
        """`samples` completions of each prompt, each as soon as it ends.

        Sample s of the prompt with index i has the number i · samples + s, and is drawn from random numbers that
        depend on (seed, that number, position) only.

        Raises:
            PromptTooLong: before anything runs.
        """
        places = {prompt.index * samples + s: prompt for prompt in prompts for s in range(samples)}
        longest = max(prompts, key=lambda p: len(p.tokens), default=None)
        if longest and len(longest.tokens) + sampling.longest > self.length:
            self.add(Request(-1, longest.tokens, sampling, seed, 0))
        for number, prompt in places.items():
            self.add(Request(number, prompt.tokens, sampling, seed, number))
        parts: dict[str | int, list[Token]] = {number: [] for number in places}
        while parts:
            for token in self.step():
                parts[token.key].append(token)
                if token.finish_reason:
                    assert isinstance(token.key, int)
                    yield self._rollout(places[token.key], token.key, parts.pop(token.key))

    def _admit(self) -> list[Token]:
        """Read waiting prompts into free slots, each distinct prompt once, and draw their first tokens."""
        running, waiting = self._running, self._waiting
        admitted: list[Running] = []
        tokens = 0
        while waiting and len(running) + len(admitted) < self._cache.slots:
            same = admitted and admitted[-1].request.tokens == waiting[0].request.tokens
            new = 0 if same else len(waiting[0].request.tokens)
            if admitted and tokens + new > self._prefill_tokens:
                break
            tokens += new
            admitted.append(waiting.popleft())
        groups = [list(group) for _, group in groupby(admitted, key=lambda s: s.request.tokens)]
        slots = iter(range(len(running), len(running) + len(admitted)))
        lengths = tuple(len(g[0].request.tokens) for g in groups)
        attend = Prefill(self._cache, lengths, [[next(slots) for _ in group] for group in groups])
        flat = torch.tensor([t for g in groups for t in g[0].request.tokens], device=self._device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self._device)
        hidden = self.transformer(flat, positions, attend)[torch.tensor(lengths).cumsum(0) - 1, 0]
        copies = torch.tensor([i for i, g in enumerate(groups) for _ in g])
        running += admitted
        return self._extend(admitted, self._logits(hidden)[copies])

    def _advance(self) -> list[Token]:
        """One more token for every running sequence."""
        running = self._running
        lengths = torch.tensor([s.cached for s in running], device=self._device)
        tokens = torch.tensor([s.tokens[-1] for s in running], device=self._device)
        hidden = self.transformer(tokens, lengths, Decode(self._cache, lengths))[:, 0]
        return self._extend(running, self._logits(hidden))

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        model = self.transformer.model
        return local_logits(hidden_BD, self.transformer.inference_head, 0, model.vocabulary, model.logit_cap)

    def _extend(self, sequences: list[Running], logits_BV: Tensor) -> list[Token]:
        found = []
        for sequence, row in zip(sequences, logits_BV, strict=True):
            request = sequence.request
            numbers = uniforms(request.seed, [request.sample], [len(sequence.tokens)])
            drawn = draw(row[None], numbers, request.sampling)
            token, logp = int(drawn.tokens[0]), float(drawn.logp[0])
            sequence.tokens.append(token)
            sequence.finish_reason = reason = self._reason(sequence)
            found.append(Token(request.key, token, logp, logp, self.weight_version, reason))
        self._generated += len(found)
        return found

    def _reason(self, sequence: Running) -> str | None:
        request, sampling = sequence.request, sequence.request.sampling
        if sampling.exact_lengths:
            wanted = sampling.exact_lengths[request.sample % len(sampling.exact_lengths)]
            return "length" if len(sequence.tokens) >= wanted else None
        if sequence.tokens[-1] in self.transformer.model.eos_tokens:
            return "stop"
        if sampling.stop and any(stop in self._decode_text(sequence.tokens) for stop in sampling.stop):
            return "stop"
        return "length" if len(sequence.tokens) >= sampling.max_new_tokens else None

    def _drop_finished(self) -> None:
        """The last running sequences move into the slots of those that ended."""
        slot, running = 0, self._running
        while slot < len(running):
            sequence = running[slot]
            if sequence.finish_reason is None:
                slot += 1
                continue
            last = running.pop()
            if last is not sequence:
                self._cache.move(len(running), slot, last.cached)
                running[slot] = last

    def _rollout(self, prompt: Prompt, number: int, tokens: list[Token]) -> Rollout:
        ids = tuple(t.token for t in tokens)
        return Rollout(
            prompt=prompt,
            sample=number,
            tokens=ids,
            logp=tuple(t.logp for t in tokens),
            text=self._decode_text(list(ids)),
            finish_reason=tokens[-1].finish_reason or "abort",
            weight_versions=tuple(t.weight_version for t in tokens),
            sampling_logp=tuple(t.sampling_logp for t in tokens),
        )


def load_rollout_engine(
    checkpoint: Path,
    *,
    dtype: str,
    length: int = 1 << 20,
    sequences: int = 64,
    cache_gib: float = 1.0,
    budget: int = 2048,
    groups: Groups | None = None,
) -> tuple[RolloutEngine, Tokenizer]:
    """A rollout engine over a checkpoint, in a world of this process alone unless `groups` says otherwise."""
    source = Checkpoint(checkpoint)
    tokenizer = Tokenizer(source.files)
    stage = build(ModelConfig(**source.manifest["model"]), groups or alone(), DTYPES[dtype], source)
    engine = RolloutEngine(
        transformer_of(stage),
        decode=tokenizer.decode,
        length=length,
        sequences=sequences,
        cache_gib=cache_gib,
        budget=budget,
    )
    return engine, tokenizer
