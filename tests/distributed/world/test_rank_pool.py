"""Worlds that follow each other in the same processes leave nothing behind."""

import os
import threading

import psutil
import pytest
import torch
from deepspeed.utils import groups as deepspeed_groups

from lockstep.data.batch import sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.step_result import StepResult
from lockstep.distributed.world.groups import Groups, alone, leave
from lockstep.distributed.world.rank_pool import MOST_THREADS, RankPool
from lockstep.model.config import ModelConfig, MoEConfig
from lockstep.model.loading import build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights

MODEL = ModelConfig(
    layers=2, width=16, heads=4, kv_heads=2, head_dim=4, intermediate=24, vocabulary=61, context=32, tied=False
)


def threads_before_a_step(groups: Groups) -> int:
    """How many threads this process has when it enters a world in which it then trains."""
    threads = psutil.Process().num_threads()
    step_of_a_tiny_model(groups, count=2)  # from the second pass on, ZeRO-3 knows the order of modules
    return threads


def step_of_a_tiny_model(groups: Groups, model: ModelConfig = MODEL, count: int = 1) -> StepResult:
    """The last of `count` updates in a new world."""
    stage = build(model, groups, torch.float32, RandomWeights(model, 0))
    trainer = Trainer(stage, groups, OptimizerConfig())
    samples = [sample([1, 2], [3, 4, 5], weight=1 / 6)] * 2
    rows = rows_for_ranks(samples, row_rules(groups.layout, 16))[groups.data_rank]
    return [trainer.step(rows, nll, 1e-3) for _ in range(count)][-1]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_groups_of_a_world_that_was_left_are_gone(worlds: RankPool, zero: int) -> None:
    layout = Layout(data=2, zero=zero)
    first, *later = [worlds.run(layout, threads_before_a_step) for _ in range(3)]
    assert later == [first, first]


def what_deepspeed_left(groups: Groups) -> tuple[str, list[str]]:
    """What stands in the place of torch's linear layer before a step with experts, and which of them are known."""
    left = torch.nn.functional.linear.__name__, [*deepspeed_groups._EXPERT_PARALLEL_GROUP]
    moe = MoEConfig(experts=2, experts_per_token=1, intermediate=8)
    step_of_a_tiny_model(groups, MODEL.model_copy(update={"moe": moe} if groups.layout.expert > 1 else {}))
    return left


@pytest.mark.parametrize("layout", [Layout(data=2, zero=3), Layout(expert=2)], ids=str)
def test_deepspeed_forgets_a_world_that_was_left(worlds: RankPool, layout: Layout) -> None:
    for _ in range(2):
        assert worlds.run(layout, what_deepspeed_left) == [("linear", [])] * 2


def test_a_process_alone_names_no_world_to_others_once_it_left() -> None:
    before = dict(os.environ)
    alone()
    leave()
    assert dict(os.environ) == before


def process_with_threads(groups: Groups, count: int) -> int:
    """Which process this is; more threads remain in it."""
    for _ in range(count):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return psutil.Process().pid


def test_processes_with_many_threads_are_replaced(worlds: RankPool) -> None:
    few, same, other = (worlds.run(Layout(data=2), process_with_threads, count) for count in (1, MOST_THREADS, 1))
    assert few == same
    assert not {*few} & {*other}
