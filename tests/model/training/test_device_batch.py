"""Rows move to a device one at a time."""

import gc
import weakref

import numpy as np
import torch

from lockstep.data.batch import sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.world.groups import Groups
from lockstep.model.config import ModelConfig
from lockstep.model.loading import build
from lockstep.model.training.config import row_rules
from lockstep.model.training.device_batch import DeviceRows
from lockstep.model.weights.initialization import RandomWeights

MODEL = ModelConfig(layers=1, width=8, heads=2, kv_heads=1, head_dim=4, intermediate=8, vocabulary=31, context=64)


def test_what_a_micro_batch_needs_ends_with_it(groups: Groups) -> None:
    stage = build(MODEL, groups, torch.float32, RandomWeights(MODEL, 0))
    tokens = np.random.default_rng(0).integers(0, 31, (5, 12))
    rows = rows_for_ranks([sample(t[:3], t[3:]) for t in tokens], row_rules(groups.layout, 1))[0]
    batches = DeviceRows(stage, groups, rows, [torch.full((len(row.targets),), float(i)) for i, row in enumerate(rows)])
    assert len(batches) == 5
    alive = []
    for i, batch in enumerate(batches):
        gc.collect()
        assert not any(reference() for reference in alive)
        assert batch.loss_inputs.reference_logp.tolist() == [i] * len(rows[i].targets)
        assert batch.tokens.tolist() == rows[i].tokens.tolist()
        alive.append(weakref.ref(batch))
        del batch
