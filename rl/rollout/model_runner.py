"""Forward passes of a transformer with a KV cache: the tokens of a plan in, logits out.

Passes that compute one token of each sequence, and what may follow it, go through the CPU decoder where it serves the
model; others go module by module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lockstep.data.batch import Experts
from lockstep.distributed.device import sent
from lockstep.model import cpu_decoder
from lockstep.model.attention.exact_kv_cache import exact_cache
from lockstep.model.attention.kv_cache import KVCache, PagedAttention, Span, block_bytes, kinds
from lockstep.model.layers.logprobs import local_logits
from lockstep.model.layers.routing import Recorder, Route, expert_dtype
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.config import EngineConfig
from lockstep.rl.rollout.scheduling.block_pool import pool_sizes
from lockstep.rl.rollout.scheduling.plan import Chunk, Plan


def block_counts(transformer: Transformer, config: EngineConfig) -> list[int]:
    """Blocks of a KV cache for each kind of layer (see `kv_cache.kinds`), of `config.cache_gib` together."""
    model, dtype = transformer.model, next(transformer.parameters()).dtype
    return pool_sizes(
        kinds(model),
        block_bytes(model, kv_heads=_kv_heads(transformer), dtype=dtype),
        memory=int(config.cache_gib * 2**30),
        sequences=config.sequences,
        length=min(config.length, model.context),
        budget=config.budget,
    )


@dataclass(frozen=True)
class PassOutput:
    """What a forward pass computed."""

    logits_BV: Tensor | None
    """This tensor rank's, [B, V/tensor], of `Plan.rows`; None where no sequence draws."""
    hidden_TD: Tensor | None
    """Activations of all tokens, [T, width]; None of the decoder, whose sequences all draw."""
    experts_TLK: Experts | None = None
    """Experts that all tokens went to in each layer, best first, where they are recorded."""


class ModelRunner:
    """A transformer with its KV cache, which the first pass allocates; tensor ranks run the same plans."""

    def __init__(self, transformer: Transformer, blocks: Sequence[int], *, records: bool = False) -> None:
        """
        Args:
            blocks: of the KV cache, for each kind of layer (see `kv_cache.kinds`).
            records: whether passes return the experts that tokens went to; of a model with experts.
        """
        self.transformer, parameter = transformer, next(transformer.parameters())
        self._records = records
        self.device = parameter.device
        self._new_cache = partial(
            exact_cache if transformer.numerics == "exact" else KVCache,
            transformer.model,
            kv_heads=_kv_heads(transformer),
            blocks=blocks,
            dtype=parameter.dtype,
            device=self.device,
        )
        self._cache: KVCache | None = None
        self._may_decode = cpu_decoder.serves(transformer)
        self.decoder: cpu_decoder.CpuDecoder | None = None
        """Of passes that only decode, after the first of them."""
        self.pack()

    def pack(self) -> None:
        """Reorder the weights as they are now for inference; to be called whenever they have changed."""
        self.decoder = None
        self.transformer.pack()

    def release(self) -> None:
        """Free the KV cache; the next pass allocates it again, with nothing in it."""
        self._cache = self.decoder = None

    def clear(self, blocks: Sequence[list[int]]) -> None:
        """Overwrite blocks of each kind of layer with zeros: what is not a number spreads even where it is masked."""
        if self._cache is None:
            return
        for layer, kind in enumerate(self._cache.kind_of):
            self._cache.keys[layer][blocks[kind]] = 0
            self._cache.values[layer][blocks[kind]] = 0

    def run(self, plan: Plan) -> "PassOutput":
        """Run one forward pass."""
        cache = self._cache = self._cache or self._new_cache()
        if self._may_decode and not plan.forks and _decodes(plan.chunks):
            return PassOutput(self._decoded(plan.chunks, cache), None)
        recorder = Recorder() if self._records else None
        hidden_TD = self._hidden(plan.chunks, cache, recorder)
        for fork in plan.forks:
            for kind, copied in enumerate(fork.copies):
                if copied:
                    cache.copy(kind, *copied)
        logits = self._logits(hidden_TD, _rows(plan)) if plan.drawing else None
        return PassOutput(logits, hidden_TD, self._experts(recorder) if recorder else None)

    def _experts(self, recorder: Recorder) -> Experts:
        assert self.transformer.model.moe
        found: Experts = recorder.experts(expert_dtype(self.transformer.model.moe.experts)).numpy(force=True)
        return found

    def _hidden(self, chunks: Sequence[Chunk], cache: KVCache, route: Route | None) -> Tensor:
        """Activations [T, width] of all tokens of a pass."""
        attend = cache.attention(_spans(chunks))
        tokens_T, positions_T = (sent(x, self.device) for x in _tokens(chunks))
        hidden: Tensor = self.transformer(tokens_T, positions_T, attend, route=route)
        return hidden[:, 0]

    def _decoded(self, chunks: Sequence[Chunk], cache: KVCache) -> Tensor:
        """Logits [B, V] behind all tokens of chunks."""
        self.decoder = self.decoder or cpu_decoder.CpuDecoder(self.transformer, cache)
        attend = cache.attention(_spans(chunks))
        assert isinstance(attend, PagedAttention)
        return self.decoder(*_tokens(chunks), attend)

    def _logits(self, hidden_TD: Tensor, rows: list[int]) -> Tensor:
        """Logits [B, V/tensor] behind some rows; those of a row that several sequences share are computed once."""
        rows_K, places_B = torch.tensor(rows).unique(return_inverse=True)
        return self.logits(hidden_TD[sent(rows_K, self.device)])[sent(places_B, self.device)]

    def logits(self, hidden_KD: Tensor) -> Tensor:
        """Logits [K, V/tensor] of activations."""
        transformer, model = self.transformer, self.transformer.model
        return local_logits(
            hidden_KD,
            transformer.inference_head,
            transformer.groups.tensor_rank * len(transformer.head_weight),
            model.vocabulary,
            model.logit_cap,
            transformer.numerics,
        )


def _kv_heads(transformer: Transformer) -> int:
    """Heads of keys and values on this tensor rank."""
    return transformer.model.kv_heads // transformer.groups.layout.tensor


def _rows(plan: Plan) -> list[int]:
    """For each of `Plan.rows` the row of the token before it among all tokens of the pass."""
    ends = np.cumsum([chunk.length for chunk in plan.chunks])
    row = {id(chunk): int(end) - 1 - len(chunk.proposed) for chunk, end in zip(plan.chunks, ends, strict=True)}
    own = [row[id(chunk)] + n for chunk in plan.chunks if chunk.draws for n in range(len(chunk.proposed) + 1)]
    return own + [row[id(fork.source)] for fork in plan.forks]


def _decodes(chunks: Sequence[Chunk]) -> bool:
    """Whether a decoder can run a pass: one known token of each sequence, all of which draw the next."""
    return sum(c.length for c in chunks) <= cpu_decoder.ROWS and all(c.draws and c.count == 1 for c in chunks)


def _tokens(chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
    """All tokens [T] of a pass, and their positions [T]."""
    tokens = np.concatenate([c.tokens for c in chunks])
    positions = np.concatenate([np.arange(c.start, c.start + c.length) for c in chunks])
    return torch.from_numpy(tokens), torch.from_numpy(positions)


def _spans(chunks: Sequence[Chunk]) -> list[Span]:
    return [Span(c.sequence.tables, c.start, c.length) for c in chunks]
