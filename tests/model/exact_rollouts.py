"""Both sides of exact numerics for tests: the trainer's packed rows, and passes over a cache in every odd way."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.data.batch import Sample, sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.world.groups import Groups
from lockstep.model.attention.exact import attend_exactly
from lockstep.model.attention.spec import PLAIN, AttentionSpec
from lockstep.model.config import ModelConfig, MoEConfig, Numerics
from lockstep.model.layers.logprobs import local_logits, reduced
from lockstep.model.layers.recompute import Recompute
from lockstep.model.loading import DTYPES, build, transformer_of
from lockstep.model.objectives.objective import LossInputs
from lockstep.model.ops.cpu import kernels
from lockstep.model.rope import Rope
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights

WAYS = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "without a compiler"])


def by_way(compiled: bool) -> AbstractContextManager[Any]:
    """With the loops of `kernels.c`, which there have to be, or as where there is no compiler for them."""
    assert kernels.usable(torch.float32, torch.device("cpu"))
    return nullcontext() if compiled else patch.object(kernels, "usable", return_value=False)


ODD = dict(width=44, heads=4, kv_heads=2, head_dim=12, intermediate=76, vocabulary=301, context=512, layers=2)
MODELS: dict[str, ModelConfig] = {
    "llama": ModelConfig.model_validate(ODD | dict(width=600, intermediate=900)),
    "gemma": ModelConfig.model_validate(
        ODD
        | dict(
            norm="rms_offset",
            norm_at="around",
            attention_cap=2.0,
            logit_cap=3.0,
            query_scalar=20,
            window=21,
            full_layers=(1,),
            activation="gelu_tanh",
            embedding_scale=6.6,
            qk_norm="head",
        )
    ),
    "gpt2": ModelConfig.model_validate(
        ODD
        | dict(
            rope="learned",
            norm="layer",
            gated=False,
            activation="gelu_tanh",
            kv_heads=4,
            biases=("qkv", "out", "mlp"),
            width=520,
        )
    ),
    "olmo": ModelConfig.model_validate(
        ODD | dict(norm_at="after", qk_norm="width", tied=False, activation="gelu", head_dim=80, heads=8)
    ),
    "experts": ModelConfig.model_validate(
        ODD
        | dict(
            moe=MoEConfig(experts=6, experts_per_token=3, intermediate=530, shared_intermediate=36, shared_gate=True),
            rope=Rope(theta=500.0),
        )
    ),
}


def transformer(groups: Groups, name: str, dtype: str, numerics: Numerics = "exact") -> tuple[Trainer, Transformer]:
    """A random model whose norms and biases say something, and a trainer of it."""
    model = MODELS[name]
    stage = build(model, groups, DTYPES[dtype], RandomWeights(model, 3, deviation=0.08), numerics)
    with torch.no_grad():
        for path, parameter in transformer_of(stage).named_parameters():
            if parameter.dim() == 1:
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(path)))
                parameter += 0.3 * drawn.to(parameter.dtype)
    return Trainer(stage, groups, OptimizerConfig(), temperature=0.9), transformer_of(stage)


def samples_of(draw: np.random.Generator, prompts: int, longest: int) -> list[Sample]:
    """Groups of samples of mixed lengths; the column `old_logp` numbers all tokens."""
    found: list[Sample] = []
    for _ in range(prompts):
        prompt = draw.integers(0, 301, draw.integers(1, longest))
        for _ in range(draw.integers(1, 4)):
            length = int(draw.integers(1, longest))
            found.append(sample(prompt, draw.integers(0, 301, length)))
    numbered, start = [], 0
    for each in found:
        stop = start + len(each.completion)
        numbered.append(sample(each.prompt, each.completion, old_logp=np.arange(start, stop, dtype=np.float32)))
        start = stop
    return numbered


def learned(
    groups: Groups, trainer: Trainer, samples: list[Sample], budget: int, recompute: Recompute, *, grad: bool
) -> np.ndarray:
    """The trainer's log-probability of every token, with the gradient or without."""
    rows = rows_for_ranks(samples, row_rules(groups.layout, budget))[groups.data_rank]
    found = np.full(sum(len(s.completion) for s in samples), np.nan, np.float32)

    def put(logp: Tensor, numbers: np.ndarray | Tensor) -> None:
        found[np.asarray(numbers, np.int64)] = logp.detach().numpy()

    def objective(logp: Tensor, columns: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        assert logp.requires_grad == grad
        put(logp, columns.old_logp.numpy())
        return logp.sum(), {"loss": logp.detach().sum()}

    trainer.transformer.recompute = recompute
    if grad:
        trainer.step(rows, objective, 0.0)
    else:
        for row, logp in zip(rows, trainer.score(rows), strict=True):
            put(logp, row.old_logp)
    return found


@dataclass
class Run:
    """A sample on its way through passes: what is cached of each layer, and the log-probabilities so far."""

    sample: Sample
    first: int
    """Number of its first token."""
    cached: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @property
    def text(self) -> np.ndarray:
        """What is read: all but the last token."""
        return np.concatenate([self.sample.prompt, self.sample.completion[:-1]])


class Chunks:
    """`Attend` for a chunk of each of several runs, whose keys and values it appends."""

    def __init__(self, runs: list[Run], lengths: list[int], draw: np.random.Generator) -> None:
        self._runs, self._lengths, self._draw = runs, lengths, draw

    def __call__(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        """See `Attend`."""
        for run, k, v in zip(self._runs, k_TGE.split(self._lengths), v_TGE.split(self._lengths), strict=True):
            run.keys[layer] = torch.cat((run.keys.get(layer, k[:0]), k))
            run.values[layer] = torch.cat((run.values.get(layer, v[:0]), v))
        q = padded(list(q_THE.split(self._lengths)), int(self._draw.integers(0, 90)))
        more = int(self._draw.integers(0, 90))
        k, v = (padded([cache[layer] for cache in caches], more) for caches in zip(*self._caches(), strict=True))
        first = torch.tensor([run.cached for run in self._runs])
        mixed = attend_exactly(q, k.transpose(1, 2), v.transpose(1, 2), first, spec)
        return torch.cat([m[:n] for m, n in zip(mixed, self._lengths, strict=True)])

    def _caches(self) -> list[tuple[dict[int, Tensor], dict[int, Tensor]]]:
        return [(run.keys, run.values) for run in self._runs]


def padded(parts: list[Tensor], more: int) -> Tensor:
    """[N, longest + more, …], with any numbers where a sequence has none."""
    out = torch.full((len(parts), max(map(len, parts)) + more, *parts[0].shape[1:]), 7.0, dtype=parts[0].dtype)
    for place, part in zip(out, parts, strict=True):
        place[: len(part)] = part
    return out


def rolled(transformer: Transformer, samples: list[Sample], draw: np.random.Generator) -> np.ndarray:
    """The log-probability of every token from passes over chunks of random runs.

    Runs start at any time, take over what another of their prompt has cached, and lose all of it now and then.
    """
    firsts = np.cumsum([0, *(len(s.completion) for s in samples)])
    runs = [Run(s, int(n)) for s, n in zip(samples, firsts, strict=False)]
    found = np.full(firsts[-1], np.nan, np.float32)
    while waiting := [r for r in runs if r.cached < len(r.text)]:
        chosen = [waiting[i] for i in draw.permutation(len(waiting))[: draw.integers(1, 9)]]
        for run in chosen:
            _share_or_lose(run, runs, draw)
        lengths = [int(draw.integers(1, min(len(r.text) - r.cached, draw.choice([1, 9, 80])) + 1)) for r in chosen]
        threads = torch.get_num_threads()
        torch.set_num_threads(int(draw.integers(1, 3)))
        _pass(transformer, chosen, lengths, draw, found)
        torch.set_num_threads(threads)
    return found


def _share_or_lose(run: Run, runs: list[Run], draw: np.random.Generator) -> None:
    if draw.random() < 0.03:
        run.cached, run.keys, run.values = 0, {}, {}
    prompt = run.sample.prompt
    lenders = [r for r in runs if r.cached >= len(prompt) and np.array_equal(r.sample.prompt, prompt)]
    shared = len(prompt) - 1  # the last one is computed, since its logits are wanted
    if run.cached == 0 and lenders and shared and draw.random() < 0.7:
        run.keys = {layer: x[:shared] for layer, x in lenders[0].keys.items()}
        run.values = {layer: x[:shared] for layer, x in lenders[0].values.items()}
        run.cached = shared


@torch.inference_mode()
def _pass(
    transformer: Transformer, runs: list[Run], lengths: list[int], draw: np.random.Generator, found: np.ndarray
) -> None:
    spans = [np.arange(r.cached, r.cached + n) for r, n in zip(runs, lengths, strict=True)]
    tokens = np.concatenate([r.text[s] for r, s in zip(runs, spans, strict=True)])
    positions = torch.from_numpy(np.concatenate(spans))
    hidden = transformer(torch.from_numpy(tokens), positions, Chunks(runs, lengths, draw))[:, 0]
    places, targets, numbers = [], [], []
    start = 0
    for run, span in zip(runs, spans, strict=True):
        begin = len(run.sample.prompt) - 1
        predicts = np.flatnonzero(span >= begin)
        places.append(start + predicts)
        targets.append(run.sample.completion[span[predicts] - begin])
        numbers.append(run.first + span[predicts] - begin)
        start, run.cached = start + len(span), run.cached + len(span)
    at = torch.from_numpy(np.concatenate(places))
    if len(at):
        logp = scores(transformer, hidden[at], torch.from_numpy(np.concatenate(targets)))
        found[np.concatenate(numbers)] = logp.numpy()


def scores(transformer: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities as a rollout computes them."""
    model, groups, weight = transformer.model, transformer.groups, transformer.inference_head
    first = groups.tensor_rank * transformer.head_weight.shape[0]
    logits = local_logits(hidden, weight, first, model.vocabulary, model.logit_cap, transformer.numerics)
    log_sum, at_target = reduced(logits, targets - first, 0.9, groups.tensor, transformer.numerics)
    return at_target - log_sum


def differing(a: np.ndarray, b: np.ndarray) -> int:
    """Bits in which two arrays of fp32 differ."""
    assert not np.isnan(a).any()
    return int(np.bitwise_count(a.view(np.uint32) ^ b.view(np.uint32)).sum())
