"""Rollout workers on vLLM, in Ray processes of another interpreter: new weights, and a worker that is killed."""

import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.model.training.config import OptimizerConfig, TrainerConfig
from lockstep.rl.remote import WorkerDied, gather
from lockstep.rl.rollout.config import EngineConfig, RolloutConfig, SamplingParams
from lockstep.rl.rollout.loading import load_rollout_engine, to_lockstep
from lockstep.rl.rollout.output_processor import RolloutRequest, generate
from lockstep.rl.types import Completion, Prompt
from lockstep.rl.weight_sync.config import Transport
from lockstep.rl.workers.stubs import RolloutWorker
from lockstep.rl.workers.worker_groups import ModelGroup, RolloutGroup
from tests.rl.conftest import Actors
from tests.rl.rollout.vllm_engines import IS_THERE, LEFT_OUT, PYTHON

PROMPT, SAMPLING = (5, 6, 7, 8), SamplingParams(max_new_tokens=12, exact_lengths=(12,))


def drawn(rollouts: RolloutGroup) -> Completion:
    request = RolloutRequest(3, PROMPT, SAMPLING, seed=1)
    (completion,) = gather([rollouts.teams[0][0].call(RolloutWorker.work, [request], 32)])[0].completions
    return completion


def expected(checkpoint: Path, groups: Groups) -> tuple[int, ...]:
    """What our engine draws."""
    engine, _ = load_rollout_engine(checkpoint, EngineConfig(length=64, cache_gib=0.01), dtype="float32", groups=groups)
    return next(generate(engine, [Prompt(3, "", PROMPT, "")], SAMPLING, samples=1, seed=1)).tokens


@pytest.mark.exhaustive
@pytest.mark.skipif(not IS_THERE, reason=LEFT_OUT)
@pytest.mark.parametrize("transport", ["memory", "broadcast"])
def test_a_worker_on_vllm_takes_a_policys_weights_and_is_replaced(
    transport: Transport, actors: Actors, wide_folder: Path, groups: Groups, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(wide_folder)).save_pretrained(tmp_path / "other")
    for file in wide_folder.glob("tokenizer*"):
        (tmp_path / "other" / file.name).write_text(file.read_text())
    first, other = (to_lockstep(str(at), tmp_path / at.name / "ours") for at in (wide_folder, tmp_path / "other"))
    policy = ModelGroup(Layout(), threads=1, trainer=TrainerConfig(row_tokens=256))
    limits = RolloutConfig(
        engine="vllm", python=str(PYTHON), workers=1, sequences=4, length=64, cache_gib=0.05, bucket_mib=0.01,
        transport=transport,
    )  # fmt: skip
    rollouts = RolloutGroup(limits, threads=1)
    calls = rollouts.start(first, "float32")
    gather(policy.start(other, "float32", OptimizerConfig(), 1.0) + calls)
    rollouts.check_agreement()
    before = drawn(rollouts)
    assert (before.tokens, set(before.weight_versions)) == (expected(first, groups), {0})
    assert rollouts.receive(policy) == []
    after = drawn(rollouts)
    assert (after.tokens, set(after.weight_versions)) == (expected(other, groups), {1})
    assert after.tokens != before.tokens
    os.kill(gather([rollouts.teams[0][0].call(RolloutWorker.pid)])[0], signal.SIGKILL)
    with pytest.raises(WorkerDied, match="rollout 0 died"):
        drawn(rollouts)
    for calls in rollouts.replacing(0):
        gather(calls)
    assert rollouts.fill(policy, [0]) == []
    assert drawn(rollouts) == after
    for worker in (*policy.workers, *rollouts.teams[0]):
        worker.end()
