"""Micro-batches, packing and data ranks change no gradient, the losses of routers included."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.engine import Engine, MissingGradient
from lockstep.distributed.layout import Layout
from lockstep.distributed.pipeline import Stage, megatron_config
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, MoEConfig
from lockstep.model.loading import build, transformer_of
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from tests.distributed.test_parity import global_batch

DENSE = ModelConfig(
    layers=3, width=48, heads=6, kv_heads=2, head_dim=8, intermediate=80, vocabulary=301, context=64, tied=True
)
EXPERTS = MoEConfig(experts=4, experts_per_token=2, intermediate=40, balance_coefficient=0.3, z_coefficient=0.01)
MODELS = {"dense": DENSE, "experts": DENSE.model_copy(update={"moe": EXPERTS})}


def gradients(groups: Groups, model: ModelConfig, row_tokens: int) -> dict[str, np.ndarray[Any, Any]]:
    """What the optimizer is given for each logical tensor, in a layout that splits none."""
    source = RandomWeights(model, seed=3, deviation=0.2)
    trainer = Trainer(build(model, groups, torch.float32, source), groups, OptimizerConfig(clip_norm=0.0))
    found = {}

    def keep(*_: Any) -> None:
        for parameter, piece in pieces(transformer_of(trainer.stage)):
            assert parameter.grad is not None
            found[piece.name] = piece.view(parameter.grad).double().numpy().copy()

    hook = register_optimizer_step_pre_hook(keep)
    rows = rows_for_ranks(global_batch(model.vocabulary, 5), row_rules(groups.layout, row_tokens, model))
    trainer.step(rows[groups.data_rank], nll, 1e-3)
    hook.remove()
    return found


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def expected(model: ModelConfig, worlds: RankPool) -> dict[str, np.ndarray[Any, Any]]:
    return worlds.run(Layout(zero=0), gradients, model, 64)[0]


@pytest.mark.parametrize(
    ("layout", "row_tokens"),
    [
        (Layout(zero=0), 1),
        (Layout(zero=0), 40),
        (Layout(zero=0), 1000),
        (Layout(data=2, zero=0), 1),
        (Layout(data=2, zero=0), 64),
        (Layout(data=4, zero=0), 1000),
    ],
    ids=str,
)
def test_gradients_are_those_of_any_other_cut(
    layout: Layout, row_tokens: int, model: ModelConfig, expected: dict[str, np.ndarray[Any, Any]], worlds: RankPool
) -> None:
    for found in worlds.run(layout, gradients, model, row_tokens):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert np.linalg.norm(found[name] - gradient) <= 1e-6 * np.linalg.norm(gradient), name


class _Forgetful(torch.autograd.Function):
    """x + b, whose backward pass forgets b, as some libraries' do where a weight beside it is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor) -> Tensor:
        return x + b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))


def test_a_parameter_that_a_backward_pass_forgets_is_named(groups: Groups) -> None:
    module = _Biased()
    stage = Stage(module, megatron_config(groups, layers=1, width=4, heads=1, dtype=torch.float32))
    parts = {"all": list(module.parameters())}
    engine = Engine(stage, groups, torch.optim.AdamW(module.parameters()), clip_norm=1.0, parts=parts)

    def forward(_: nn.Module, batch: Tensor, received: Tensor | None, chunk: int) -> Tensor:
        return _Forgetful.apply(batch * module.weight, module.bias).sum()

    def loss(result: Tensor, _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return result, {"loss": result}

    with pytest.raises(MissingGradient, match="bias received no gradient on rank 0"):
        engine.step([torch.ones(3)], forward, loss, tokens=3, learning_rate=1e-3)
