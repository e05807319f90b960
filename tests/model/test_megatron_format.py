"""Folders that megatron-core wrote, read bit for bit, and folders that we wrote, loaded by megatron-core."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.distributed.checkpoint.spec import Box, Source, digest, state_name, to_numpy, whole
from lockstep.distributed.device import megatron_device
from lockstep.distributed.groups import Groups
from lockstep.distributed.layout import Layout
from lockstep.distributed.worlds import Worlds
from lockstep.model.attention import DocumentAttention
from lockstep.model.config import ModelConfig, MoEConfig
from lockstep.model.formats.megatron import MegatronFolder, write
from lockstep.model.formats.torch_dist import BadTorchDist
from lockstep.model.logprobs import local_logits
from lockstep.model.names import RandomWeights, logical_tensors
from lockstep.model.rope import Rope
from lockstep.model.train import build, transformer_of
from tests.model.megatron_models import Naive, filled, loaded, resaved, save

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
        **(SIZES | {"kv_heads": 4, "head_dim": 6}),
    ),
    "experts": ModelConfig(
        vocabulary=33,
        intermediate=12,
        family="mixtral",
        tied=False,
        moe=MoEConfig(experts=4, experts_per_token=2, intermediate=12),
        **SIZES,
    ),
    "shared": ModelConfig(
        vocabulary=33,
        intermediate=20,
        family="qwen2_moe",
        biases=("qkv",),
        moe=MoEConfig(
            experts=2,
            experts_per_token=1,
            intermediate=12,
            shared_intermediate=8,
            shared_gate=True,
            normalize=False,
        ),
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


class WithAdam(Drawn):
    """Drawn weights, with Adam's state after 7 updates."""

    updates = 7

    @property
    def states(self) -> Sequence[str]:
        kinds = ("exp_avg", "exp_avg_sq", *(("master",) if self.dtype == torch.bfloat16 else ()))
        return tuple(state_name(kind, name) for name in self._shapes for kind in kinds)

    def read(self, name: str, box: Box) -> np.ndarray:
        kind, _, tensor = name.rpartition("/")
        if not kind:
            return super().read(name, box)
        drawn = np.random.default_rng([*name.encode()]).standard_normal(self._shapes[tensor], dtype=np.float32)
        return drawn[tuple(slice(a, b) for a, b in box)]


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


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as we write it, with Adam's state."""
    folder = tmp_path_factory.mktemp("ours")
    for name, model in MODELS.items():
        write(folder / name, model, WithAdam(model, dtype_of(name)), {"tokenizer.json": "{}"})
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_what_we_wrote_is_read_bit_for_bit(name: str, ours: Path) -> None:
    model, found = MODELS[name], MegatronFolder(ours / name)
    expected = WithAdam(model, dtype_of(name))
    assert found.config == model
    assert differing(found, expected, model) == []
    assert set(found.states) == set(expected.states)
    assert found.updates == 7
    for state in found.states:
        box = whole(logical_tensors(model)[state.split("/")[1]])
        assert digest(found.read(state, box)) == digest(expected.read(state, box)), state


@torch.no_grad()
def differing_in_megatron(groups: Groups, folder: Path) -> list[str]:
    """Parameters of this rank's GPTModels that megatron-core filled with other bits than we do by hand."""
    wrong = []
    for name, model in MODELS.items():
        if model.moe and groups.layout.processes > 2:
            continue
        module = loaded(groups, model, dtype_of(name), folder / name)
        naive = Naive(groups, model, Drawn(model, dtype_of(name)))
        wrong += [
            f"{name} {path}" for path, p in module.named_parameters() if not torch.equal(p, naive.parameter(path))
        ]
    return wrong


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_megatron_loads_what_we_wrote(layout: Layout, ours: Path, worlds: Worlds) -> None:
    assert worlds.run(layout, differing_in_megatron, ours) == [[]] * layout.processes


@torch.no_grad()
def largest_difference(groups: Groups, folder: Path) -> dict[str, float]:
    """Of our logits from Megatron's, for the models that it computes without Transformer Engine."""
    found = {}
    for name in ("untied", "biases", "gpt2"):
        model = MODELS[name]
        tokens, positions = torch.arange(11) * 7 % model.vocabulary, torch.arange(11)
        transformer = transformer_of(build(model, groups, torch.float32, MegatronFolder(folder / name)))
        hidden = transformer(tokens, positions, DocumentAttention([[11]], tokens.device))[:, 0]
        mine = local_logits(hidden, transformer.head_weight, 0, model.vocabulary)[:, : model.vocabulary]
        module = loaded(groups, model, torch.float32, folder / name).eval()
        with megatron_device():
            mask = torch.ones(11, 11, dtype=torch.bool).triu(1)[None, None]
            theirs = module(tokens[None], positions[None], mask)[0, :, : model.vocabulary]
        assert theirs.std() > 0.1
        found[name] = float((mine - theirs).abs().max())
    return found


def test_our_logits_equal_those_of_megatron(ours: Path, worlds: Worlds) -> None:
    (found,) = worlds.run(Layout(), largest_difference, ours)
    assert max(found.values()) < 1e-4, found


RESAVED = [
    ("tied", Layout(tensor=2, data=2), "fully_reshardable"),
    ("untied", Layout(tensor=2, pipeline=2), "fully_reshardable"),
    ("tied", Layout(pipeline=2), None),
    ("untied", Layout(tensor=2), None),
]


@pytest.mark.parametrize(("name", "layout", "sharding"), RESAVED, ids=str)
def test_adam_goes_through_megatron_and_back(
    name: str, layout: Layout, sharding: str | None, ours: Path, tmp_path: Path, worlds: Worlds
) -> None:
    model, dtype = MODELS[name], dtype_of(name)
    for groups in worlds.run(layout, resaved, model, dtype, ours / name, tmp_path / "back", sharding):
        assert {(g["wd_mult"], g["weight_decay"], g["eps"], g["lr"]) for g in groups} == {
            (1.0, 0.01, 1e-8, 1e-4),
            (0.0, 0.0, 1e-8, 1e-4),
        }
    expected, back = WithAdam(model, dtype), MegatronFolder(tmp_path / "back", model)
    assert set(back.states) == set(expected.states)
    assert back.updates == 7
    assert differing(back, expected, model) == []
    for state in back.states:
        box = whole(logical_tensors(model)[state.split("/")[1]])
        assert digest(back.read(state, box)) == digest(expected.read(state, box)), state


def test_buckets_without_names_are_refused_and_weights_are_not(ours: Path, tmp_path: Path, worlds: Worlds) -> None:
    model = MODELS["untied"]
    arguments = (model, torch.float32, ours / "untied", tmp_path / "back", "dp_reshardable")
    worlds.run(Layout(tensor=2), resaved, *arguments)
    found = MegatronFolder(tmp_path / "back", model)
    assert differing(found, Drawn(model, torch.float32), model) == []
    with pytest.raises(BadTorchDist, match="save with --dist-ckpt-optim-fully-reshardable"):
        list(found.states)
