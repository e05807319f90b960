"""A phase trains with its own temperature, optimizer and clipping, whatever the trainer was made for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.loading import build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from tests.distributed.test_parity import global_batch

SFT = {"beta1": 0.5, "beta2": 0.7, "epsilon": 1e-3, "weight_decay": 0.3, "clip_norm": 0.1}
RL = {"beta1": 0.95, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0, "clip_norm": 5.0}


def figures(groups: Groups, folder: Path, kind: str) -> list[Any]:
    """Losses, norms and scores of a trainer made for SFT, of one made for RL that enters SFT, and of one that stays."""
    momentum: dict[str, Any] = {"kind": "muon", "momentum": 0.6} if kind == "muon" else {}
    sft, rl = OptimizerConfig(**SFT, **momentum), OptimizerConfig(**RL, kind=momentum.get("kind", "adamw"))
    found = []
    for optimizer, temperature, enters in ((sft, 1.0, False), (rl, 0.5, True), (rl, 0.5, False)):
        source = HuggingFaceFolder(folder)
        stage = build(source.config, groups, torch.float32, source)
        trainer = Trainer(stage, groups, optimizer, temperature=temperature)
        if enters:
            trainer.enter_phase(sft, 1.0)
        rows = rows_for_ranks(global_batch(source.config.vocabulary, 0), row_rules(groups.layout, 64))
        mine = rows[groups.data_rank]
        steps = [trainer.step(mine, nll, 1e-2) for _ in range(3)]
        scores = torch.cat(trainer.score(mine))
        found.append([*(r.values["loss"] for r in steps), *(r.grad_norm for r in steps), *scores.tolist()])
    return found


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("layout", [Layout(zero=0), *(Layout(data=2, zero=zero) for zero in (1, 2, 3))], ids=str)
def test_a_phase_has_its_own_settings(layout: Layout, kind: str, worlds: RankPool, tiny_folder: Path) -> None:
    for made, entered, stayed in worlds.run(layout, figures, tiny_folder, kind):
        assert entered == made
        assert stayed[0] != pytest.approx(made[0], rel=1e-3)
