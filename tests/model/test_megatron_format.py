"""Folders that megatron-core wrote, read bit for bit, and folders that we wrote, loaded by megatron-core."""

import argparse
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import dist_checkpointing

from lockstep.distributed.checkpoint.spec import Box, Source, digest, state_name, to_numpy, whole
from lockstep.distributed.device import megatron_device
from lockstep.distributed.groups import Groups
from lockstep.distributed.layout import Layout
from lockstep.distributed.worlds import Worlds
from lockstep.model.config import ModelConfig, MoEConfig, UnknownModel
from lockstep.model.formats.megatron import MegatronFolder, write
from lockstep.model.formats.restricted import UnreadFile
from lockstep.model.formats.torch_dist import BadTorchDist
from lockstep.model.names import RandomWeights, logical_tensors
from lockstep.model.rope import Rope
from tests.model.megatron_models import Naive, filled, gpt, save

SIZES: dict[str, Any] = {"layers": 4, "width": 24, "heads": 4, "kv_heads": 2, "head_dim": 8, "context": 16}
MODELS = {
    "tied": ModelConfig(vocabulary=31, intermediate=20, tied=True, rope=Rope(theta=5000.0), **SIZES),
    "untied": ModelConfig(vocabulary=33, intermediate=36, tied=False, family="qwen3", qk_norm="head", **SIZES),
    "biases": ModelConfig(vocabulary=40, intermediate=20, tied=False, family="qwen2", biases=("qkv",), **SIZES),
    "gpt2": ModelConfig(
        vocabulary=29,
        intermediate=20,
        family="gpt2",
        norm="layer",
        rope=None,
        gated=False,
        activation="gelu",
        biases=("qkv", "out", "mlp"),
        **(SIZES | {"kv_heads": 4}),
    ),
    "experts": ModelConfig(
        vocabulary=33,
        intermediate=20,
        family="mixtral",
        tied=False,
        moe=MoEConfig(experts=4, experts_per_token=2, intermediate=12),
        **SIZES,
    ),
}
LAYOUTS = [Layout(tensor=2, pipeline=2), Layout(tensor=2), Layout(pipeline=2), Layout()]


class Drawn(RandomWeights):
    """Random weights in a dtype, no two tensors alike: norms and biases are drawn, too."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(model, seed=3)
        self.dtype, self.model = dtype, model

    def read(self, name: str, box: Box) -> np.ndarray:
        shape = self._shapes[name]
        drawn = np.random.default_rng([*name.encode()]).standard_normal(shape, dtype=np.float32)
        drawn = drawn * np.float32(0.3) + np.float32("norm" in name)
        return to_numpy(torch.from_numpy(drawn).to(self.dtype))[tuple(slice(a, b) for a, b in box)]


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name in ("tied", "experts") else torch.float32


def differing(found: Source, expected: Source, model: ModelConfig) -> list[str]:
    """Logical tensors of which not every bit is the same."""
    return [
        name
        for name, shape in logical_tensors(model).items()
        if digest(found.read(name, whole(shape))) != digest(expected.read(name, whole(shape)))
    ]


def saved_by_megatron(groups: Groups, folder: Path) -> None:
    """Save every model, filled by hand, from all ranks."""
    for name, model in MODELS.items():
        if model.moe and groups.layout.processes > 2:
            continue
        module = filled(groups, model, dtype_of(name), Drawn(model, dtype_of(name)))
        save(folder / name, {"model": module.sharded_state_dict(), "iteration": 3})


@pytest.fixture(scope="module")
def saved(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    folders = {layout: tmp_path_factory.mktemp("megatron") for layout in LAYOUTS}
    for layout, folder in folders.items():
        worlds.run(layout, saved_by_megatron, folder)
    return folders


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_megatron_saved_is_read_bit_for_bit(layout: Layout, saved: dict[Layout, Path]) -> None:
    for folder in saved[layout].iterdir():
        model = MODELS[folder.name]
        found = MegatronFolder(folder, model)
        assert differing(found, Drawn(model, dtype_of(folder.name)), model) == []
        assert not found.states
        assert found.updates == 0
