"""A reference is a version of the policy or an average of all versions, and an average in bf16 loses nothing."""

import numpy as np
import pytest
import torch

from lockstep.distributed.groups import Groups
from lockstep.model.config import ModelConfig
from lockstep.model.names import RandomWeights
from lockstep.model.train import build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.rl.reference import Reference

MODEL = ModelConfig(
    layers=2, width=12, heads=4, kv_heads=2, head_dim=4, intermediate=10, vocabulary=31, context=8, tied=True
)


def weights(of: Transformer) -> np.ndarray:
    return torch.cat([p.detach().double().flatten() for p in of.parameters()]).numpy()


def move(policy: Transformer, step: int) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_average_is_of_all_versions(dtype: torch.dtype, groups: Groups) -> None:
    policy, kept = (build(MODEL, groups, dtype, RandomWeights(MODEL, seed=1)) for _ in range(2))
    reference = Reference(kept, decay=0.995)
    expected = weights(transformer_of(policy))
    for step in range(1, 41):
        move(transformer_of(policy), step)
        reference.follow(transformer_of(policy), step)
        expected = 0.995 * expected + 0.005 * weights(transformer_of(policy))
    found = weights(transformer_of(reference.stage))
    resolution = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    np.testing.assert_allclose(found, expected, rtol=resolution, atol=1e-6)


def test_a_version_stays_until_it_is_replaced(groups: Groups) -> None:
    policy, kept, fixed = (build(MODEL, groups, torch.float32, RandomWeights(MODEL, seed=1)) for _ in range(3))
    reference, constant = Reference(kept, every=3), Reference(fixed)
    assert reference.moves
    assert not constant.moves
    versions = [weights(transformer_of(policy))]
    for step in range(1, 8):
        move(transformer_of(policy), step)
        versions.append(weights(transformer_of(policy)))
        for each in (reference, constant):
            each.follow(transformer_of(policy), step)
        assert np.array_equal(weights(transformer_of(reference.stage)), versions[step // 3 * 3])
        assert np.array_equal(weights(transformer_of(constant.stage)), versions[0])
