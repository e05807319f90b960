"""Measures rollout/trainer mismatch: a model generates completions of real prompts, and a trainer scores them again."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from lockstep.data.batch import Floats
from lockstep.data.packing import RowRules, rows_for_ranks
from lockstep.data.tasks.task import TaskConfig, make_split
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.layout import Layout
from lockstep.distributed.pipeline import Stage
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, Numerics, check_layout
from lockstep.model.formats.registry import open_model
from lockstep.model.loading import DTYPES, build, transformer_of
from lockstep.model.objectives.mismatch import differing_bits
from lockstep.model.training.forward import score
from lockstep.model.weights.lora import merged
from lockstep.rl.algorithms.estimates import columns, of_tokens, scores_of
from lockstep.rl.prompts import make_prompt
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import as_lockstep
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.types import Prompt, Rollout

ROW_TOKENS = 2048
"""Of the trainer's packed rows."""


@dataclass(frozen=True)
class Mismatch:
    """Statistics of the difference between the log-probabilities of the same tokens, in nats."""

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
    """The trainer's log-probabilities of all tokens of rollouts [T], one rollout after the other.

    Rows are packed as in training: completions of a prompt share it, as far as a row is long enough.

    Args:
        temperature: that the rollouts were drawn with.
    """
    (rows,) = rows_for_ranks(of_tokens(rollouts), RowRules(budget=ROW_TOKENS))
    scores = [logp.numpy(force=True) for logp in score(stage, groups, rows, temperature)]
    return np.concatenate(columns([scores_of(rows, scores)], [len(r.tokens) for r in rollouts]))


def reported(rollouts: Iterable[Rollout]) -> Floats:
    """The log-probabilities that the rollout engine reported [T], one rollout after the other."""
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
    """Generate completions, score them again, and compare: the body of every rank of a tensor group."""
    source = Checkpoint(checkpoint)
    model, weights = merged(ModelConfig(**source.manifest["model"]), source)
    stage = build(model, groups, DTYPES[dtype], weights, numerics)
    engine = RolloutEngine(transformer_of(stage), decode=Tokenizer(source.files).decode)
    rollouts = list(generate(engine, prompts, sampling, samples=samples, seed=seed))
    return compare(reported(rollouts), rescored(stage, groups, rollouts, sampling.temperature or 1.0))


TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Work:
    """What is generated and scored, and in which dtype and numerics."""

    sampling: SamplingParams
    dtype: str = "bfloat16"
    numerics: Numerics = "fast"
    tensor: int = 1
    prompts: Path | None = None
    """One a line, as text, or as JSON with the key "prompt"; held-out problems of `TaskConfig()` otherwise."""
    count: int = 16
    """Prompts at most."""
    samples: int = 4
    """Completions of each."""
    seed: int = 0


def measure_mismatch(name: str, work: Work) -> Mismatch:
    """Measure the mismatch of a checkpoint of any format; the body of `lockstep mismatch`.

    Raises:
        ValueError: one sentence on what does not fit.
    """
    layout = Layout(tensor=work.tensor)
    with tempfile.TemporaryDirectory() as folder, RankPool(TIMEOUT_S) as worlds:
        checkpoint = as_lockstep(open_model(name), Path(folder))
        source = Checkpoint(checkpoint)
        check_layout(layout, ModelConfig(**source.manifest["model"]))
        prompts = _prompts(work, Tokenizer(source.files))
        given = checkpoint, work.dtype, work.numerics, prompts, work.sampling, work.samples, work.seed
        return worlds.run(layout, measure, *given)[0]


def table(found: Mismatch, work: Work) -> Table:
    """A table of the mismatch for a terminal."""
    shown = Table(title=f"rollouts against training: {work.numerics} numerics, {work.dtype}, tensor={work.tensor}")
    shown.add_column("")
    shown.add_column("", justify="right")
    for name, value in (
        ("|Δ log p|, mean", f"{found.mean:.2e}"),
        ("|Δ log p|, 99.9th percentile", f"{found.percentile_99_9:.2e}"),
        ("|Δ log p|, largest", f"{found.largest:.2e}"),
        ("KL, nats a token", f"{found.kl:.2e}"),
        ("differing bits", f"{found.differing_bits:,}"),
        ("in tokens", f"{found.differing_tokens:,} of {found.tokens:,}"),
    ):
        shown.add_row(name, value)
    return shown


def _prompts(work: Work, tokenizer: Tokenizer) -> list[Prompt]:
    if work.prompts is None:
        config = TaskConfig(held_out=work.count)
        return [make_prompt(problem, config, tokenizer) for problem in make_split(config, work.seed).held_out]
    with work.prompts.open(encoding="utf-8") as lines:
        texts = list(islice((_text(line) for line in lines if line.strip()), work.count))
    if not texts:
        raise ValueError(f"{work.prompts} has no prompts: write one a line")
    return [Prompt(i, text, tuple(tokenizer.encode_prompt(text)), "") for i, text in enumerate(texts)]


def _text(line: str) -> str:
    """A line, or its "prompt" where it is JSON that has one."""
    try:
        value = json.loads(line)
    except ValueError:
        return line.rstrip("\n")
    return str(value["prompt"]) if isinstance(value, dict) and "prompt" in value else line.rstrip("\n")
