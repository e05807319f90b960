"""Deliveries of weights that break off leave nothing open, and the next one brings whole weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from lockstep.data.batch import sample
from lockstep.distributed.layout import Layout
from lockstep.model.objectives.token_loss import nll
from lockstep.model.training.config import OptimizerConfig, TrainerConfig
from lockstep.rl.remote import ActorHandle, Call, gather
from lockstep.rl.weight_sync.config import Transport, WeightSyncConfig
from lockstep.rl.weight_sync.transfer import WeightTransfer, weight_session
from lockstep.rl.workers.stubs import ModelWorker
from lockstep.rl.workers.worker_groups import ModelGroup
from tests.rl.conftest import Actors

SIZE = 4096


@dataclass(eq=False)
class Interrupted(ActorHandle[Any]):
    """A worker whose driver gets Ctrl-C when it calls a method of it."""

    at: str = "take"

    def call(self, method: Any, *args: Any, **named: Any) -> Call[Any]:
        if method.__name__ == self.at:
            raise KeyboardInterrupt
        return super().call(method, *args, **named)


def handed_out(policy: ModelGroup) -> list[int]:
    """How many shards each rank's first message has, while its weights are open."""
    return [len(shards) for shards in policy.call(ModelWorker.weights, 0)]


@pytest.mark.parametrize(
    ("transport", "at"),
    [
        ("memory", "take"),
        ("broadcast", "end_update"),
        # The policy waits until its patience ends for a receiver that was never asked, and the group is not used again.
        pytest.param("broadcast", "broadcast_weights", marks=pytest.mark.exhaustive),
    ],
)
def test_a_delivery_that_breaks_off_leaves_no_session_open(transport: Transport, at: str, actors: Actors) -> None:
    policy, [member] = actors.policy.workers, actors.rollouts.teams[0]
    transfer = WeightTransfer(WeightSyncConfig(bucket_mib=SIZE / 2**20, transport=transport))
    assert transfer.give(policy, {0: [member]}, 1) == [0]
    with pytest.raises(KeyboardInterrupt):
        transfer.give(policy, {0: [Interrupted(member.name, member.handle, at=at)]}, 2)
    assert handed_out(actors.policy) == [0], "the policy still hands out weights"
    # The engine compares what came with the digests that the policy signed, and refuses what is not whole.
    assert transfer.give(policy, {0: [member]}, 3) == [0]
    assert handed_out(actors.policy) == [0]
    assert actors.rollouts.resume(actors.policy, actors.rollouts.version) == [], "other tests go on with that version"


@pytest.fixture(scope="module")
def split(actors: Actors) -> Iterator[ModelGroup]:
    """A policy whose two ranks hold a part of each weight, as ZeRO-3 has it."""
    policy = ModelGroup(Layout(data=2, zero=3), threads=1, trainer=TrainerConfig(row_tokens=256), role="split")
    gather(policy.start(actors.checkpoint, "float32", OptimizerConfig(), 1.0))
    yield policy
    for worker in policy.workers:
        worker.end()


def fail_within_a_session(policy: ModelGroup) -> None:
    with weight_session(policy.workers, SIZE) as session:
        assert session.messages > 1
        assert any(handed_out(policy))
        raise ZeroDivisionError


def test_weights_of_zero_3_are_split_again_after_an_error(split: ModelGroup) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_within_a_session(split)
    assert not any(handed_out(split))
    samples = [sample((1, 5, 3), (8, 2, number)) for number in range(4)]
    assert gather(split.update(1, samples, nll, 1e-3))[0].grad_norm > 0, "training goes on"
    with weight_session(split.workers, SIZE) as session:
        assert session.messages > 1
