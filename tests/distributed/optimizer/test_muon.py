"""Muon: the same numbers in any layout, and those of a few naive lines on a model of `transformers`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.optimizer.zero import newton_schulz
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.loading import build, transformer_of
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from tests.distributed import test_expert_parity
from tests.distributed.test_parity import assembled, global_batch, train
from tests.parameters import every

MUON = OptimizerConfig(kind="muon", learning_rate=3e-3, weight_decay=0.1, beta2=0.9)
LAYOUTS = [
    Layout(tensor=2),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual=2),
    Layout(context=2),
    Layout(data=2, zero=0),
    Layout(data=2),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(data=2, offload=True),
    Layout(data=2, zero=3, offload=True),
    Layout(data=3, zero=1),
    Layout(data=3, zero=3),
    Layout(tensor=2, data=2, zero=0),
    Layout(tensor=2, data=2, zero=2),
    Layout(tensor=2, data=2, zero=3),
    Layout(tensor=2, pipeline=2),
    Layout(pipeline=2, data=2, zero=2),
]
EXPERT_LAYOUTS = [
    Layout(tensor=2),
    Layout(expert=2),
    Layout(expert=2, tensor=2),
    Layout(expert=2, data=2, zero=0),
    Layout(expert=2, data=2, zero=1),
    Layout(expert=2, data=2, zero=2),
    Layout(data=2, zero=3),
]


@pytest.fixture(scope="module")
def alone(worlds: RankPool, tiny_folder: Path) -> Any:
    return worlds.run(Layout(), train, tiny_folder, 4, 64, "none", MUON)[0]


def compare(results: list[Any], alone: Any, atol: float) -> None:
    history, held = alone
    for rank, (other, _) in enumerate(results):
        np.testing.assert_allclose(other, history, rtol=2e-5, err_msg=f"rank {rank}")
    expected = {name: array for name, _, array in held}
    for name, array in assembled([part for _, part in results], expected).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    "layout",
    every(LAYOUTS, part=lambda layout: layout.processes < 4 or layout.zero == 2),
    ids=str,
)
def test_a_layout_trains_to_the_same_numbers(layout: Layout, alone: Any, worlds: RankPool, tiny_folder: Path) -> None:
    compare(worlds.run(layout, train, tiny_folder, 4, 64, "none", MUON), alone, 1e-5)


@pytest.fixture(scope="module")
def expert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("experts") / "model"
    test_expert_parity.qwen2().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts_alone(worlds: RankPool, expert_folder: Path) -> Any:
    return worlds.run(Layout(), test_expert_parity.train, expert_folder, 4, 64, torch.float32, MUON)[0]


@pytest.mark.parametrize(
    "layout",
    every(EXPERT_LAYOUTS, part=lambda layout: layout.zero > 1 or layout.processes == 2),
    ids=str,
)
def test_each_expert_is_a_matrix_of_its_own(
    layout: Layout, experts_alone: Any, worlds: RankPool, expert_folder: Path
) -> None:
    results = worlds.run(layout, test_expert_parity.train, expert_folder, 4, 64, torch.float32, MUON)
    compare(results, experts_alone, 3e-5)  # as in test_expert_parity: AdamW on gradients that are all but 0


def orthogonalised(matrix: Tensor) -> Tensor:
    """Newton–Schulz as in Jordan et al. 2024, in fp64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.to(matrix.dtype)


def naive(folder: Path, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms and weights after some steps of Muon and AdamW, one sample at a time."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    named = dict(model.named_parameters())
    matrices = {n: torch.zeros_like(p) for n, p in named.items() if n.endswith("_proj.weight")}
    adamw = torch.optim.AdamW(
        [
            {"params": [named["model.embed_tokens.weight"]], "weight_decay": MUON.weight_decay},
            {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=MUON.learning_rate,
        betas=(MUON.beta1, MUON.beta2),
        eps=MUON.epsilon,
    )
    norms = []
    for step in range(steps):
        model.zero_grad()
        for each in global_batch(model.config.vocab_size, step % 2):
            tokens = torch.tensor(np.concatenate([each.prompt, each.completion]))
            logp = model(tokens[None, :-1]).logits[0].log_softmax(-1)[-len(each.completion) :]
            chosen = logp.gather(1, torch.tensor(each.completion)[:, None])[:, 0]
            (-(torch.tensor(each.weight.copy()) * chosen).sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MUON.clip_norm)))
        adamw.step()
        with torch.no_grad():
            for name, average in matrices.items():
                weight, gradient = named[name], named[name].grad
                assert gradient is not None
                average.mul_(0.95).add_(gradient, alpha=0.05)
                update = orthogonalised(0.05 * gradient + 0.95 * average)
                weight.mul_(1 - MUON.learning_rate * MUON.weight_decay)
                weight.sub_(MUON.learning_rate * 0.2 * max(weight.shape) ** 0.5 * update)
    return norms, {name: p.detach() for name, p in named.items()}


def test_four_steps_are_those_of_a_naive_muon(alone: Any, tiny_folder: Path) -> None:
    history, held = alone
    norms, expected = naive(tiny_folder, 4)
    assert min(norms) > MUON.clip_norm
    np.testing.assert_allclose([norm for _, norm in history], norms, rtol=2e-5)
    for name, _, array in held:
        np.testing.assert_allclose(array, expected[name].numpy(), rtol=1e-4, atol=2e-5, err_msg=name)


def test_iterations_are_those_of_torch_but_for_its_precision() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(48, 80))
    weight.grad = torch.randn(48, 80)
    gradient = weight.grad.clone()
    torch.optim.Muon([weight], lr=1.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw").step()
    ours = -0.2 * 80**0.5 * newton_schulz(gradient[None], exact=True)[0]
    assert (weight.detach() - ours).norm() / ours.norm() < 0.02  # bf16, which torch always takes
    assert (newton_schulz(gradient[None], exact=True)[0] - orthogonalised(gradient)).abs().max() < 2e-6


def forgetful(groups: Groups, folder: Path, forget: bool) -> Any:
    """Weights after a step without a rate and one with; momentum from the first is the only thing that may differ."""
    source = HuggingFaceFolder(folder)
    stage = build(source.config, groups, torch.float32, source)
    trainer = Trainer(stage, groups, MUON)
    for step, rate in enumerate((0.0, 1e-3)):
        if forget:
            trainer.engine.forget()
        rows = rows_for_ranks(global_batch(source.config.vocabulary, step), row_rules(groups.layout, 64))
        trainer.step(rows[groups.data_rank], nll, rate)
    with trainer.engine.whole_weights():
        return {p.name: p.view(t).clone() for t, p in pieces(transformer_of(stage))}


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_what_is_forgotten_leaves_no_momentum(zero: int, worlds: RankPool, tiny_folder: Path) -> None:
    kept, forgotten = (worlds.run(Layout(zero=zero), forgetful, tiny_folder, forget)[0] for forget in (False, True))
    model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    for each in global_batch(model.config.vocab_size, 1):
        tokens = torch.tensor(np.concatenate([each.prompt, each.completion]))
        logp = model(tokens[None, :-1]).logits[0].log_softmax(-1)[-len(each.completion) :]
        (-0.01 * logp.gather(1, torch.tensor(each.completion)[:, None]).sum()).backward()
    name = "model.layers.1.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    assert weight.grad is not None
    expected = weight.detach() * (1 - 1e-4) - 1e-3 * 0.2 * 80**0.5 * orthogonalised(weight.grad.T).T
    torch.testing.assert_close(forgotten[name], expected, rtol=1e-4, atol=1e-6)
    assert (kept[name] - expected).abs().max() > 1e-5


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bfloat16_has_the_same_numbers_but_for_rounding(
    zero: int, experts_alone: Any, worlds: RankPool, expert_folder: Path
) -> None:
    arguments = (test_expert_parity.train, expert_folder, 4, 64, torch.bfloat16, MUON)
    history, _ = worlds.run(Layout(data=2, zero=zero), *arguments)[0]
    np.testing.assert_allclose(history, experts_alone[0], rtol=0.03)
