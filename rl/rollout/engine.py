"""Completions by continuous batching: a sequence that ends makes room at once for one that waits."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.place import Place
from lockstep.distributed.groups import alone
from lockstep.model.config import ModelConfig
from lockstep.model.kv_cache import Decode, KVCache, Prefill
from lockstep.model.logprobs import local_logits
from lockstep.model.train import DTYPES, build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.sampler import SamplingConfig, draw, uniforms
from lockstep.rl.rollout.sequence import Sequence as Running
from lockstep.rl.sync import Shard, receive
from lockstep.rl.types import Prompt, Rollout


class PromptTooLong(ValueError):
    """A prompt that leaves no room for a completion."""


class RolloutEngine:
    """Draws completions from one whole transformer."""

    def __init__(
        self,
        transformer: Transformer,
        *,
        slots: int,
        length: int,
        decode: Callable[[list[int]], str],
        prefill: int = 2048,
    ) -> None:
        """
        Args:
            slots: sequences that run at the same time.
            length: tokens of the longest prompt and completion together.
            decode: tokens to text.
            prefill: tokens of prompts that are read in one forward pass, unless one prompt alone is longer.
        """
        model = transformer.model
        self.transformer, self._decode_text, self._prefill_tokens = transformer, decode, prefill
        self._device = next(transformer.parameters()).device
        self._cache = KVCache(
            layers=model.layers,
            slots=slots,
            length=min(length, model.context),
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            dtype=next(transformer.parameters()).dtype,
        )
        self.weight_version = 0
        transformer.pack()

    def receive(self, version: int, shards: Sequence[Shard]) -> None:
        """Take over new weights.

        Raises:
            WeightsDiffer: when a tensor is missing or its bits differ.
        """
        receive(self.transformer, shards)
        self.transformer.pack()
        self.weight_version = version

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, samples: int, seed: int
    ) -> Iterator[Rollout]:
        """`samples` completions of each prompt, each as soon as it ends.

        Sample s of the prompt with index i has the number i · samples + s, and is drawn from random numbers that
        depend on (seed, that number, position) only.

        Raises:
            PromptTooLong: before anything runs.
        """
        longest = max((len(p.tokens) for p in prompts), default=0)
        new = max((sampling.max_new_tokens, *sampling.exact_lengths))
        if longest + new > self._cache.length:
            raise PromptTooLong(
                f"a prompt of {longest} tokens and {new} new ones need a context of {longest + new}, "
                f"and rollouts have {self._cache.length}"
            )
        waiting = deque(Running(p, p.index * samples + s) for p in prompts for s in range(samples))
        running: list[Running] = []
        while waiting or running:
            while waiting and len(running) < self._cache.slots:
                self._admit(waiting, running, sampling, seed)
                yield from self._finished(running)
            if running:
                self._advance(running, sampling, seed)
                yield from self._finished(running)

    def _admit(self, waiting: deque[Running], running: list[Running], sampling: SamplingConfig, seed: int) -> None:
        """Read waiting prompts into free slots, each distinct prompt once, and draw their first tokens."""
        admitted: list[Running] = []
        tokens = 0
        while waiting and len(running) + len(admitted) < self._cache.slots:
            new = 0 if admitted and admitted[-1].prompt is waiting[0].prompt else len(waiting[0].prompt.tokens)
            if admitted and tokens + new > self._prefill_tokens:
                break
            tokens += new
            admitted.append(waiting.popleft())
        groups = [list(group) for _, group in groupby(admitted, key=lambda s: id(s.prompt))]
        slots = iter(range(len(running), len(running) + len(admitted)))
        attend = Prefill(
            self._cache,
            tuple(len(g[0].prompt.tokens) for g in groups),
            [[next(slots) for _ in group] for group in groups],
        )
        flat = torch.tensor([t for g in groups for t in g[0].prompt.tokens], device=self._device)
        positions = torch.cat([torch.arange(len(g[0].prompt.tokens)) for g in groups]).to(self._device)
        last = torch.tensor([len(g[0].prompt.tokens) for g in groups]).cumsum(0) - 1
        hidden = self.transformer(flat, positions, attend)[last, 0]
        copies = torch.tensor([i for i, g in enumerate(groups) for _ in g])
        running += admitted
        self._extend(admitted, self._logits(hidden)[copies], sampling, seed)

    def _advance(self, running: list[Running], sampling: SamplingConfig, seed: int) -> None:
        """One more token for every running sequence."""
        lengths = torch.tensor([s.cached for s in running], device=self._device)
        tokens = torch.tensor([s.tokens[-1] for s in running], device=self._device)
        hidden = self.transformer(tokens, lengths, Decode(self._cache, lengths))[:, 0]
        self._extend(running, self._logits(hidden), sampling, seed)

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        model = self.transformer.model
        return local_logits(hidden_BD, self.transformer.inference_head, 0, model.vocabulary, model.logit_cap)

    def _extend(self, sequences: list[Running], logits_BV: Tensor, sampling: SamplingConfig, seed: int) -> None:
        numbers = uniforms(seed, [s.sample for s in sequences], [len(s.tokens) for s in sequences])
        drawn = draw(logits_BV, numbers, sampling)
        for sequence, token, logp in zip(sequences, drawn.tokens.tolist(), drawn.logp.tolist(), strict=True):
            sequence.tokens.append(token)
            sequence.logp.append(logp)
            sequence.finish_reason = self._reason(sequence, sampling)

    def _reason(self, sequence: Running, sampling: SamplingConfig) -> str | None:
        if sampling.exact_lengths:
            wanted = sampling.exact_lengths[sequence.sample % len(sampling.exact_lengths)]
            return "length" if len(sequence.tokens) >= wanted else None
        if sequence.tokens[-1] in self.transformer.model.eos_tokens:
            return "stop"
        if sampling.stop and any(stop in self._decode_text(sequence.tokens) for stop in sampling.stop):
            return "stop"
        return "length" if len(sequence.tokens) >= sampling.max_new_tokens else None

    def _finished(self, running: list[Running]) -> Iterator[Rollout]:
        """Hand out the sequences that ended; the last running ones move into their slots."""
        slot = 0
        while slot < len(running):
            sequence = running[slot]
            if sequence.finish_reason is None:
                slot += 1
                continue
            last = running.pop()
            if last is not sequence:
                self._cache.move(len(running), slot, last.cached)
                running[slot] = last
            yield self._rollout(sequence)

    def _rollout(self, sequence: Running) -> Rollout:
        assert sequence.finish_reason is not None
        return Rollout(
            prompt=sequence.prompt,
            sample=sequence.sample,
            tokens=tuple(sequence.tokens),
            logp=tuple(sequence.logp),
            text=self._decode_text(sequence.tokens),
            finish_reason=sequence.finish_reason,
            weight_version=self.weight_version,
        )


def load_rollout_engine(
    checkpoint: Path | Place, *, dtype: str, slots: int, length: int
) -> tuple[RolloutEngine, Tokenizer]:
    """A rollout engine over a checkpoint, in a world of this process alone."""
    source = Checkpoint(checkpoint)
    tokenizer = Tokenizer(source.files)
    stage = build(ModelConfig(**source.manifest["model"]), alone(), DTYPES[dtype], source)
    engine = RolloutEngine(transformer_of(stage), slots=slots, length=length, decode=tokenizer.decode)
    return engine, tokenizer
