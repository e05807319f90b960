"""A worker's process loads neither torch's compiler nor TensorBoard, which it has no use for."""

import subprocess
import sys

import pytest

HEAVY = {"torch._inductor", "torch._dynamo", "torch.utils.tensorboard"}
"""A third of the time that a process takes to start."""


@pytest.mark.parametrize("worker", ["model_worker", "rollout_worker"])
def test_a_worker_loads_no_compiler(worker: str) -> None:
    lists = f"import sys, lockstep.rl.workers.{worker}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", lists], capture_output=True, text=True, check=True)
    loaded = set(found.stdout.split())
    assert {"megatron.core", "deepspeed"} <= loaded
    assert not loaded & HEAVY
