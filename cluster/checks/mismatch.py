"""Do rollouts and trainer agree."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lockstep.data.batch import Floats, documents, pack
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.groups import Groups
from lockstep.distributed.pipeline import Stage
from lockstep.model.config import ModelConfig, Numerics
from lockstep.model.loading import DTYPES, build, transformer_of
from lockstep.model.objectives.mismatch import differing_bits
from lockstep.model.training.forward import score
from lockstep.model.weights.lora import merged
from lockstep.rl.algorithms.estimates import columns, of_tokens, scores_of
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.types import Prompt, Rollout

ROW_TOKENS = 2048
"""Of the trainer's packed rows."""


@dataclass(frozen=True)
class Mismatch:
    """Of log-probabilities of the same tokens, in nats."""

    tokens: int
    mean: float
    """Of |Δ log p|."""
    percentile_99_9: float
    largest: float
    kl: float
    """A token, of the rollouts' policy to the trainer's: the k3 estimator, which is never negative."""
    differing_tokens: int
    differing_bits: int


def compare(rollout: Floats, trainer: Floats) -> Mismatch:
    """The mismatch of log-probabilities [T], in fp32 on both sides.

    Raises:
        ValueError: when there are none, or one is not a number.
    """
    if not len(rollout) or not np.isfinite([rollout, trainer]).all():
        raise ValueError(f"{len(rollout)} log-probabilities, or numbers that are not finite, cannot be compared")
    delta = trainer.astype(np.float64) - rollout
    gap = np.abs(delta)
    return Mismatch(
        tokens=len(gap),
        mean=float(gap.mean()),
        percentile_99_9=float(np.quantile(gap, 0.999)),
        largest=float(gap.max()),
        kl=float((np.expm1(delta) - delta).mean()),
        differing_tokens=int((rollout.view(np.int32) != trainer.view(np.int32)).sum()),
        differing_bits=int(differing_bits(torch.from_numpy(rollout), torch.from_numpy(trainer))),
    )


def rescored(stage: Stage, groups: Groups, rollouts: Sequence[Rollout], temperature: float) -> Floats:
    """The trainer's log-probabilities of all tokens of rollouts, one rollout after the other.

    Rows are packed as in training: completions of a prompt share it.

    Args:
        temperature: that the rollouts were drawn with.
    """
    rows = pack(documents(of_tokens(rollouts)), budget=ROW_TOKENS)
    scores = [logp.numpy(force=True) for logp in score(stage, groups, rows, temperature)]
    return np.concatenate(columns([scores_of(rows, scores)], [len(r.tokens) for r in rollouts]))


def reported(rollouts: Iterable[Rollout]) -> Floats:
    """The log-probabilities that rollouts report, one rollout after the other."""
    parts: list[NDArray[np.float32]] = [np.asarray(r.logp, np.float32) for r in rollouts]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def measure(
    groups: Groups,
    checkpoint: Path | Storage,
    dtype: str,
    numerics: Numerics,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    samples: int,
    seed: int,
) -> Mismatch:
    """Write completions and score them again, on every rank of a tensor group."""
    source = Checkpoint(checkpoint)
    model, weights = merged(ModelConfig(**source.manifest["model"]), source)
    stage = build(model, groups, DTYPES[dtype], weights, numerics)
    engine = RolloutEngine(transformer_of(stage), decode=Tokenizer(source.files).decode)
    rollouts = list(engine.generate(prompts, sampling, samples=samples, seed=seed))
    return compare(reported(rollouts), rescored(stage, groups, rollouts, sampling.temperature or 1.0))
