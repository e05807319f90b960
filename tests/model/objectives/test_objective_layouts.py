"""Objectives that look at whole samples, on a model: any layout and any rows, the same loss and gradient."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.data.batch import Sample, sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.loading import build
from lockstep.model.objectives.importance_ratio import Clip, Correction
from lockstep.model.objectives.kl import KL
from lockstep.model.objectives.objective import Objective
from lockstep.model.objectives.pair_loss import PairLoss
from lockstep.model.objectives.token_loss import TokenLoss
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.rl.algorithms.aggregation import weighted

GSPO = TokenLoss(
    level="sequence",
    clip=Clip(0.5, 0.5),
    kl=KL(0.1),
    correction=Correction("truncate", "sequence", high=1.2),
    entropy=0.1,
)
OBJECTIVES: dict[str, Objective] = {
    "gspo": GSPO,
    "dpo": PairLoss("sigmoid", 0.1),
    "rankings": PairLoss("plackett_luce"),
}


def batch(vocabulary: int) -> list[Sample]:
    """Five prompts with two to four answers each, compared and of either advantage."""
    draw = np.random.default_rng(0)
    samples = []
    for group in range(5):
        prompt = draw.integers(0, vocabulary, draw.integers(1, 20))
        for place in range(draw.integers(2, 5)):
            length = int(draw.integers(1, 15))
            logp = draw.normal(-6, 0.5, length).astype(np.float32)
            columns = {
                "old_logp": logp,
                "proximal_logp": logp + draw.normal(0, 0.1, length).astype(np.float32),
                "reference_logp": logp + draw.normal(0, 0.3, length).astype(np.float32),
                "advantage": float(draw.normal()),
            }
            completion = draw.integers(0, vocabulary, length)
            samples.append(sample(prompt, completion, **columns, group=group, preference=place))
    return weighted(samples, "sequences")


def stepped(groups: Groups, folder: Path, names: list[str], row_tokens: int) -> list[Any]:
    """Reports and gradient norm of each objective's first two steps, the second of which shows what the first did."""
    found = []
    for name in names:
        source = HuggingFaceFolder(folder)
        trainer = Trainer(build(source.config, groups, torch.float32, source), groups, OptimizerConfig())
        rows = rows_for_ranks(batch(source.config.vocabulary), row_rules(groups.layout, row_tokens))
        results = [trainer.step(rows[groups.data_rank], OBJECTIVES[name], 1e-3) for _ in range(2)]
        found.append([r.values | {"grad_norm": r.grad_norm} for r in results])
    return found


@pytest.fixture(scope="module")
def alone(worlds: RankPool, tiny_folder: Path) -> list[Any]:
    return worlds.run(Layout(), stepped, tiny_folder, [*OBJECTIVES], 64)[0]


def check(found: list[Any], expected: list[Any], tolerance: float) -> None:
    for name, mine, theirs in zip(OBJECTIVES, found, expected, strict=True):
        for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            for key in b.keys() - {"memory_gb", "mismatch_bits"}:
                assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (name, step, key)


@pytest.mark.parametrize("layout", [Layout(data=2), Layout(context=2), Layout(pipeline=2), Layout(tensor=2)], ids=str)
def test_a_layout_changes_no_number(layout: Layout, alone: Any, worlds: RankPool, tiny_folder: Path) -> None:
    for found in worlds.run(layout, stepped, tiny_folder, [*OBJECTIVES], 64):
        check(found, alone, 5e-5)


@pytest.mark.parametrize("row_tokens", [1, 1000])
def test_the_size_of_a_row_changes_no_number(row_tokens: int, alone: Any, worlds: RankPool, tiny_folder: Path) -> None:
    check(worlds.run(Layout(), stepped, tiny_folder, [*OBJECTIVES], row_tokens)[0], alone, 1e-5)


def test_something_was_learned(alone: Any) -> None:
    for name, (first, second) in zip(OBJECTIVES, alone, strict=True):
        assert first["grad_norm"] > 1e-3, name
        assert second["loss"] < first["loss"], name
