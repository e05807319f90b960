"""Operations per token, counted weight by weight."""

import math

import pytest

from lockstep.model.config import ModelConfig, MoEConfig
from lockstep.model.training.flops import training_flops
from lockstep.model.weights.names import logical_tensors

DENSE = ModelConfig(
    layers=3, width=48, heads=6, kv_heads=2, head_dim=8, intermediate=80, vocabulary=301, context=64, tied=True
)
EXPERTS = MoEConfig(experts=8, experts_per_token=2, intermediate=40, shared_intermediate=24, shared_gate=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False},
        {"moe": EXPERTS},
        {"rope": None, "kv_heads": 6, "gated": False, "norm": "layer", "biases": ("qkv", "out", "mlp")},
    ],
    ids=str,
)
def test_each_weight_of_a_product_counts_six_times(changes: dict[str, object]) -> None:
    model = DENSE.model_copy(update=changes)
    weights = 0.0
    for name, shape in logical_tensors(model).items():
        looked_up = "embed_positions" in name or ("embed_tokens" in name and not model.tied)
        weights += 0 if looked_up else math.prod(shape) * (2 / 8 if ".experts." in name else 1)
    attention = 6 * model.layers * model.heads * model.head_dim * 32
    assert training_flops(model, 32) == pytest.approx(6 * weights + attention)
