"""Groups that are split over rows and data ranks, with their prompt repeated, give the numbers of whole groups."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.data.batch import Sample, TokenBatch, sample
from lockstep.data.packing import RowRules, rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.loading import build, transformer_of
from lockstep.model.objectives.importance_ratio import Clip, Correction
from lockstep.model.objectives.kl import KL
from lockstep.model.objectives.token_loss import TokenLoss
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.device_batch import to_device
from lockstep.model.training.forward import scorer
from lockstep.model.training.trainer import Trainer
from lockstep.rl.algorithms.aggregation import weighted
from tests.model.exact_rollouts import differing, learned, samples_of, transformer

GSPO = TokenLoss(level="sequence", clip=Clip(0.5, 0.5), kl=KL(0.1), correction=Correction("truncate", "sequence"))
"""Of which a loss is wrong as soon as a sample is in two rows."""
WHOLE, SPLIT = 1000, 60
"""Tokens of a row: all of a group, and two or three of its completions with the prompt."""


def long_groups(vocabulary: int) -> list[Sample]:
    draw = np.random.default_rng(0)
    samples = []
    for _ in range(3):
        prompt = draw.integers(0, vocabulary, draw.integers(5, 20))
        for _ in range(6):
            length = int(draw.integers(5, 25))
            old = draw.normal(-6, 0.5, length).astype(np.float32)
            near, far = (old + draw.normal(0, spread, length).astype(np.float32) for spread in (0.1, 0.3))
            columns = {"old_logp": old, "proximal_logp": near, "reference_logp": far, "advantage": float(draw.normal())}
            samples.append(sample(prompt, draw.integers(0, vocabulary, length), **columns))
    return weighted(samples, "sequences")


def gradient(groups: Groups, folder: Path, budget: int) -> tuple[float, Tensor]:
    """The loss of a batch and the gradient of all weights, flat, added up over rows."""
    source = HuggingFaceFolder(folder)
    model = transformer_of(build(source.config, groups, torch.float32, source))
    (rows,) = rows_for_ranks(long_groups(source.config.vocabulary), RowRules(budget=budget))
    total = 0.0
    for row in rows:
        batch = to_device(row, groups, model.model.kv_heads, torch.device("cpu"))
        loss, _ = GSPO(scorer(groups, 1.0)(model, batch, None, 0)[0], batch.loss_inputs)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def longest(rows: Sequence[TokenBatch]) -> int:
    return max(len(row.tokens) for row in rows)


def test_splitting_changes_no_gradient_beyond_rounding(groups: Groups, tiny_folder: Path) -> None:
    loss, wanted = gradient(groups, tiny_folder, WHOLE)
    other, found = gradient(groups, tiny_folder, SPLIT)
    assert other == pytest.approx(loss, rel=1e-6)
    assert wanted.norm() > 0.1
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert not torch.equal(found, wanted), "rows are others, and so are sums"


def stepped(groups: Groups, folder: Path, budget: int) -> list[dict[str, float]]:
    source = HuggingFaceFolder(folder)
    trainer = Trainer(build(source.config, groups, torch.float32, source), groups, OptimizerConfig())
    rows = rows_for_ranks(long_groups(source.config.vocabulary), row_rules(groups.layout, budget))
    assert budget == WHOLE or max(map(longest, rows)) == 64, "the next multiple of 32"
    steps = [trainer.step(rows[groups.data_rank], GSPO, 1e-3) for _ in range(2)]
    return [result.values | {"grad_norm": result.grad_norm} for result in steps]


def test_a_group_may_be_split_over_data_ranks(worlds: RankPool, tiny_folder: Path) -> None:
    alone = worlds.run(Layout(), stepped, tiny_folder, WHOLE)[0]
    for found in worlds.run(Layout(data=2), stepped, tiny_folder, SPLIT):
        for mine, theirs in zip(found, alone, strict=True):
            for key in theirs.keys() - {"memory_gb", "mismatch_bits"}:
                assert mine[key] == pytest.approx(theirs[key], rel=5e-6, abs=1e-6), key
    assert alone[1]["loss"] < alone[0]["loss"]


def test_exact_log_probabilities_have_the_same_bits_however_groups_are_split(groups: Groups) -> None:
    trainer, _ = transformer(groups, "llama", "bfloat16")
    samples = samples_of(np.random.default_rng(3), prompts=2, longest=60)
    whole = learned(groups, trainer, samples, WHOLE, "none", grad=False)
    for budget in (1, 90):
        assert differing(learned(groups, trainer, samples, budget, "none", grad=False), whole) == 0
