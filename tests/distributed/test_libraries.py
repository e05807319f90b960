"""A worker's process loads neither torch's compiler nor TensorBoard, which it has no use for."""

import subprocess
import sys

import pytest

HEAVY = {"torch._inductor", "torch._dynamo", "torch.utils.tensorboard"}
"""A third of the time that a process takes to start."""


@pytest.mark.parametrize(
    "loaded", ["rl.workers.model_worker", "rl.workers.rollout_worker, lockstep.rl.rollout.loading"]
)
def test_a_worker_loads_no_compiler(loaded: str) -> None:
    """A rollout worker, together with the engine that it opens."""
    lists = f"import sys, lockstep.{loaded}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", lists], capture_output=True, text=True, check=True)
    modules = set(found.stdout.split())
    assert {"megatron.core", "deepspeed"} <= modules
    assert not modules & HEAVY
