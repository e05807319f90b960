"""A reference is a version of the policy or an average of all versions, and an average in bf16 loses nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.saver import Saver
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig
from lockstep.model.loading import build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.algorithms.config import ReferenceConfig
from lockstep.rl.workers.reference_model import ReferenceModel, Saved

MODEL = ModelConfig(
    layers=2, width=12, heads=4, kv_heads=2, head_dim=4, intermediate=10, vocabulary=32, context=8, tied=True
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
    reference = ReferenceModel(kept, ReferenceConfig(kind="average", decay=0.995))
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
    reference, constant = ReferenceModel(kept, ReferenceConfig(every=3)), ReferenceModel(fixed, ReferenceConfig())
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


def followed(groups: Groups, folder: Path, kind: str) -> list[np.ndarray]:
    """Saves a reference after some steps; what it held then, and what one holds that goes on from there."""
    config = ReferenceConfig.model_validate({"kind": kind} | ({"every": 3} if kind == "version" else {"decay": 0.9}))
    policy, kept = (build(MODEL, groups, torch.bfloat16, RandomWeights(MODEL, seed=1)) for _ in range(2))
    reference = ReferenceModel(kept, config)
    for step in range(1, 5):
        move(transformer_of(policy), step)
        reference.follow(transformer_of(policy), step)
    ranks = groups.layout.processes
    saver = Saver(folder, rank=groups.rank, ranks=ranks, barrier=dist.barrier if ranks > 1 else lambda: None)
    saver.save(4, reference.chunks(), {"model": MODEL.model_dump()}, {})
    saved = Saved(Checkpoint(folder))
    again = ReferenceModel(build(MODEL, groups, torch.bfloat16, saved), config, saved)
    found = []
    for each in (reference, again):
        found.append(weights(transformer_of(each.stage)))
        each.follow(transformer_of(policy), 6)
        found.append(weights(transformer_of(each.stage)))
    return found


@pytest.mark.parametrize("kind", ["version", "average"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(data=2)], ids=str)
def test_a_reference_that_moves_goes_on_from_a_checkpoint(
    layout: Layout, kind: str, worlds: RankPool, tmp_path: Path
) -> None:
    for before, after, again_before, again_after in worlds.run(layout, followed, tmp_path, kind):
        assert np.array_equal(before, again_before)
        assert np.array_equal(after, again_after)
        assert not np.array_equal(before, after)
