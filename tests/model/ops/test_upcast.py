"""Products of bf16 tensors by fp32 products, against fp64; and models that are trained and sampled by them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lockstep.data.batch import sample
from lockstep.data.packing import RowRules, rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import LoraConfig
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.layers.logprobs import token_scores
from lockstep.model.loading import build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.ops.linear import PackedWeight, packed
from lockstep.model.ops.upcast import multiply, needs_upcast
from lockstep.model.training.config import OptimizerConfig
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.lora import with_adapters
from tests.model.processors import KERNELS, processor

SIDES = st.integers(0, 40)


@KERNELS
@given(rows=SIDES, inner=SIDES, columns=SIDES)
def test_a_product_of_bf16_is_that_of_fp64_rounded(bf16_kernels: bool, rows: int, inner: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(rows * 1681 + inner * 41 + columns)
    a, b = (
        torch.randn(2, rows, inner, generator=draw).bfloat16(),
        torch.randn(2, inner, columns, generator=draw).bfloat16(),
    )
    with processor(bf16_kernels):
        assert needs_upcast(a) != bf16_kernels
        assert not needs_upcast(a.float())
        found = multiply(torch.bmm, a, b), multiply(torch.mm, a[0], b[0]), multiply(F.linear, a, b[0].t())
    expected = a.double() @ b.double(), a[0].double() @ b[0].double(), a.double() @ b[0].double()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.allclose(ours.double(), theirs, rtol=2**-7, atol=1e-4)


def test_rollouts_multiply_by_packed_weights_without_bf16_kernels() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(70, 48, generator=draw).bfloat16(), torch.randn(5, 48, generator=draw).bfloat16()
    with processor(False):
        blocks = packed(weight)
        assert isinstance(blocks, PackedWeight)
        assert blocks.tiles is not None
        assert torch.allclose(blocks(x).double(), x.double() @ weight.double().t(), rtol=2**-7, atol=1e-4)


def losses(groups: Groups, folder: str, bf16_kernels: bool, lora: bool) -> list[float]:
    """Of three steps in bf16, and the gradient norms."""
    source = HuggingFaceFolder(Path(folder))
    config, weights = with_adapters(source.config, source, LoraConfig(rank=4) if lora else None, 0)
    with processor(bf16_kernels):
        trainer = Trainer(build(config, groups, torch.bfloat16, weights), groups, OptimizerConfig())
        tokens = torch.randint(0, 300, (4, 40), generator=torch.Generator().manual_seed(0)).numpy()
        rows = rows_for_ranks([sample(t[:4], t[4:], weight=1 / 144) for t in tokens], RowRules(budget=80))[0]
        steps = [trainer.step(rows, nll, 1e-3) for _ in range(3)]
    return [value for step in steps for value in (step.values["loss"], step.grad_norm)]


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, sequence=True)], ids=str)
def test_training_by_either_learns_the_same(worlds: RankPool, tiny_folder: Path, layout: Layout, lora: bool) -> None:
    by_kernels, by_fp32 = (
        worlds.run(layout, losses, str(tiny_folder), bf16_kernels, lora)[0] for bf16_kernels in (True, False)
    )
    assert by_kernels[0] != by_kernels[2]
    assert by_fp32 == pytest.approx(by_kernels, rel=2e-2)


def test_the_gradient_of_a_vocabulary_is_rounded_once(groups: Groups) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(700, 12, generator=draw).bfloat16(), torch.randn(31, 12, generator=draw).bfloat16()
    targets = torch.randint(0, 31, (700,), generator=draw)

    def gradient(of: Tensor) -> Tensor:
        of.requires_grad_()
        found, _ = token_scores(hidden.to(of.dtype), of, targets, vocabulary=31, group=groups.tensor)
        return torch.autograd.grad(found.sum(), of)[0]

    with processor(False):
        found = gradient(weight.clone())
    assert found.dtype == torch.bfloat16
    expected = gradient(weight.double().float())
    assert torch.allclose(found.float(), expected, rtol=1e-2, atol=2e-2 * expected.abs().max().item())
