"""Norms of gradients and sizes of weights by layer: a naive sum over the model of `transformers`, in any layout."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.loading import build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from tests.distributed import test_expert_parity
from tests.distributed.test_parity import global_batch
from tests.parameters import every

LAYOUTS = [
    Layout(),
    Layout(zero=0),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(context=2),
    Layout(data=2, zero=0),
    Layout(data=2, zero=1),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(data=2, zero=1, offload=True),
    Layout(data=2, zero=2, offload=True),
    Layout(data=2, zero=3, offload=True),
    Layout(pipeline=2, data=2, zero=2),
    Layout(tensor=2, data=2, zero=3),
]
EXPERT_LAYOUTS = [
    Layout(expert=2),
    Layout(expert=2, data=2, zero=0),
    Layout(expert=2, data=2, zero=2),
    Layout(expert=2, tensor=2),
    Layout(data=2, zero=2, offload=True),
    Layout(expert=2, data=2, zero=1, offload=True),
]


def measured(groups: Groups, folder: Path, rate: float) -> tuple[dict[str, float], float]:
    """The statistics after one step, and the global norm."""
    source = HuggingFaceFolder(folder)
    stage = build(source.config, groups, torch.float32, source)
    trainer = Trainer(stage, groups, OptimizerConfig(clip_norm=0.1))
    rows = rows_for_ranks(global_batch(source.config.vocabulary, 0), row_rules(groups.layout, 64))
    result = trainer.step(rows[groups.data_rank], nll, rate)
    return trainer.statistics(result), result.grad_norm


def naive(folder: Path) -> dict[str, float]:
    """The same before a step, without a layout."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for each in global_batch(model.config.vocab_size, 0):
        tokens = torch.tensor(np.concatenate([each.prompt, each.completion]))
        logp = model(tokens[None, :-1]).logits[0].log_softmax(-1)[-len(each.completion) :]
        chosen = logp.gather(1, torch.tensor(each.completion)[:, None])[:, 0]
        (-(torch.tensor(each.weight.copy()) * chosen).sum()).backward()
    places = {"embed_tokens": "embedding", "norm": "norm", "lm_head": "head"}
    gradients: dict[str, list[torch.Tensor]] = {}
    weights: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        module = name.removeprefix("model.").split(".")
        part = f"layers.{module[1]}" if module[0] == "layers" else places[module[0]]
        assert parameter.grad is not None
        gradients.setdefault(part, []).append(parameter.grad.flatten().double())
        weights.setdefault(part, []).append(parameter.detach().flatten().double())
    norms = {f"grad_norm/{part}": float(torch.cat(g).norm()) for part, g in gradients.items()}
    return norms | {f"weight_rms/{part}": float(torch.cat(w).square().mean().sqrt()) for part, w in weights.items()}


def check(results: list[Any], expected: dict[str, float]) -> None:
    for found, norm in results:
        assert sorted(found) == sorted(expected)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-5), name
        norms = [value for name, value in found.items() if name.startswith("grad_norm/")]
        assert norm == pytest.approx(math.hypot(*norms), rel=1e-6)


@pytest.mark.parametrize(
    "layout", every(LAYOUTS, part=lambda layout: layout.zero != 2 or layout.processes == 4), ids=str
)
def test_statistics_are_those_of_the_whole_model(layout: Layout, worlds: RankPool, tiny_folder: Path) -> None:
    check(worlds.run(layout, measured, tiny_folder, 0.0), naive(tiny_folder))


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=str)
def test_experts_count_once(layout: Layout, worlds: RankPool, tmp_path: Path) -> None:
    torch.manual_seed(2)
    test_expert_parity.qwen3().save_pretrained(tmp_path)
    expected = naive(tmp_path)
    assert "weight_rms/head" in expected
    check(worlds.run(layout, measured, tmp_path, 0.0), expected)


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(data=2, zero=3)], ids=str)
def test_sizes_are_those_after_the_step(layout: Layout, worlds: RankPool, tiny_folder: Path) -> None:
    before = naive(tiny_folder)["weight_rms/layers.0"]
    alone = worlds.run(Layout(), measured, tiny_folder, 0.01)[0][0]["weight_rms/layers.0"]
    assert abs(alone / before - 1) > 1e-4
    for found, _ in worlds.run(layout, measured, tiny_folder, 0.01):
        assert found["weight_rms/layers.0"] == pytest.approx(alone, rel=1e-6)
