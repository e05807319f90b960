"""Processes that work with different things are named before a step is taken, and those that agree are left alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.model.config import ModelConfig
from lockstep.model.formats.lockstep import write_checkpoint
from lockstep.model.loading import build, transformer_of
from lockstep.model.state_dict import slice_digests
from lockstep.model.training.config import OptimizerConfig, TrainerConfig
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.remote import ActorHandle, Call, gather
from lockstep.rl.rollout.config import RolloutConfig
from lockstep.rl.workers.agreement import Loaded, RanksDiffer, check_agreement, loaded, package_digest
from lockstep.rl.workers.worker_groups import ModelGroup, RolloutGroup
from tests.rl.conftest import Actors

MODEL = ModelConfig(
    layers=2, width=12, heads=4, kv_heads=2, head_dim=4, intermediate=10, vocabulary=32, context=8, tied=True
)
SAME = Loaded("a", "1, sources 5", "s", "m", {"w[0:2]": "1", "norm[0:4]": "2"})


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (
            {"policy 1": replace(SAME, host="b", package="1, sources 6")},
            "policy 1 on b run lockstep 1, sources 6, and policy 0 on a 1, sources 5: install one version on all hosts",
        ),
        (
            {"policy 1": SAME, "policy 2": replace(SAME, host="c", settings="t")},
            "policy 2 on c were given settings of the recipe with digest t, and policy 0 on a, policy 1 on a s: start "
            "the run again with one recipe",
        ),
        (
            {"policy 1": replace(SAME, host="b", manifest="n"), "policy 2": replace(SAME, host="b", manifest="n")},
            "policy 0 on a loaded weights under a manifest with digest m, and policy 1 on b, policy 2 on b n: let "
            "model/step-000000 be the same on all hosts",
        ),
        (
            {"policy 1": replace(SAME, host="b", slices={"w[2:4]": "9", "norm[0:4]": "3"})},
            "policy 1 on b loaded other bits of norm[0:4] than policy 0 on a: let model/step-000000 be the same on all "
            "hosts",
        ),
        (
            {"policy 1": SAME, "policy 2": replace(SAME, host="c", slices={"w[0:2]": "7", "norm[0:4]": "3"})},
            "policy 2 on c loaded other bits of w[0:2] and 1 more slices than policy 0 on a, policy 1 on a: let "
            "model/step-000000 be the same on all hosts",
        ),
    ],
    ids=["package", "recipe", "manifest", "a slice that two ranks share", "replicas"],
)
def test_who_differs_is_named_with_host_and_thing(others: dict[str, Loaded], sentence: str) -> None:
    with pytest.raises(RanksDiffer) as caught:
        check_agreement([("policy 0", SAME), *others.items()], "model/step-000000")
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "others",
    [
        [SAME],
        [replace(SAME, slices={"w[2:4]": "3", "norm[0:4]": "2"})],  # another shard of w
        [replace(SAME, settings="", manifest="", slices={})],  # a process without a model
        [],
    ],
)
def test_different_shards_of_the_same_weights_agree(others: list[Loaded]) -> None:
    check_agreement([("policy", SAME), *((f"other {n}", each) for n, each in enumerate(others))])


def test_any_bit_of_any_slice_shows(groups: Groups) -> None:
    transformer = transformer_of(build(MODEL, groups, torch.bfloat16, RandomWeights(MODEL, seed=1)))
    before = slice_digests(transformer)
    for parameter in transformer.parameters():
        with torch.no_grad():
            bits = parameter.view(torch.int16).view(-1)
            for place in (0, -1):
                bits[place] ^= 1
                changed = {name for name, digest in slice_digests(transformer).items() if digest != before[name]}
                assert len(changed) == 1
                bits[place] ^= 1
    assert slice_digests(transformer) == before


def test_the_package_is_known_by_its_sources() -> None:
    assert "sources " in package_digest()
    assert loaded().package == package_digest()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of two models of one shape, as an older one may lie at the same path of another host."""
    folder = tmp_path_factory.mktemp("models")
    return [write_checkpoint(RandomWeights(MODEL, seed), MODEL, {}, folder / str(seed)) for seed in (1, 2)]


@dataclass(eq=False)
class OnOtherHost(ActorHandle[Any]):
    """A worker for which another checkpoint lies at the path that it is given."""

    there: Path = Path()

    def call(self, method: Any, *args: Any, **named: Any) -> Call[Any]:
        return super().call(method, *(self.there if isinstance(each, Path) else each for each in args), **named)


def moved(worker: ActorHandle[Any], there: Path) -> OnOtherHost:
    return OnOtherHost(worker.name, worker.handle, there=there)


FURTHER = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        pytest.param(Layout(data=2), OptimizerConfig(), id="policy, replicas"),
        pytest.param(Layout(tensor=2), None, id="reward model, shards", marks=FURTHER),
        pytest.param(Layout(pipeline=2), OptimizerConfig(), id="critic, stages", marks=FURTHER),
        pytest.param(Layout(data=2, zero=3), OptimizerConfig(), id="policy, ZeRO-3", marks=FURTHER),
    ],
)
def test_ranks_that_loaded_different_weights_take_no_step(
    layout: Layout, optimizer: OptimizerConfig | None, two: list[Path], actors: Actors
) -> None:
    group = ModelGroup(layout, threads=1, trainer=TrainerConfig(row_tokens=64))
    group.workers[1] = moved(group.workers[1], two[1])
    try:
        gather(group.start(two[0], "float32", optimizer, 1.0))
        with pytest.raises(RanksDiffer, match=r"policy 1 on \S+ loaded weights under a manifest with digest") as caught:
            group.check_agreement()
        assert f"let {two[0]} be the same on all hosts" in str(caught.value)
        assert "policy 0" in str(caught.value)
    finally:
        for worker in group.workers:
            worker.end()


def test_actors_that_agree_are_left_alone_and_a_rollout_worker_that_does_not_is_named(
    actors: Actors, tmp_path: Path
) -> None:
    actors.policy.check_agreement()
    actors.verifiers.check_agreement()
    actors.rollouts.check_agreement()
    group = RolloutGroup(RolloutConfig(workers=1, sequences=2, length=8), threads=1)
    there = Checkpoint(actors.checkpoint)
    model = ModelConfig(**there.manifest["model"])
    other = write_checkpoint(RandomWeights(model, seed=9), model, there.files, tmp_path)
    group.teams[0][0] = moved(group.teams[0][0], other)
    try:
        gather(group.start(actors.checkpoint, "float32"))
        with pytest.raises(RanksDiffer, match=r"rollout 0 on \S+ loaded weights under a manifest with digest"):
            group.check_agreement()
    finally:
        group.end(0)
