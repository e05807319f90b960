"""Weights from the policy to rollout workers on the same host, beside what its memory can copy.

A byte of a weight is read and written twice on its way, into shared memory and out of it, and read twice more for its
digest, where it leaves and where it has come: six passes over memory, of which a plain copy takes two. So a third of
the speed of a copy would be all that memory allows to one thread on each side. A broadcast, which is for other hosts,
goes through the loopback of the network here.
"""

import argparse
import math
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.cluster.launch.ray_session import ray_cluster
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.layout import Layout
from lockstep.model.formats.registry import QUICKSTART_MODEL
from lockstep.model.training.config import OptimizerConfig, TrainerConfig
from lockstep.rl.cores import threads_for
from lockstep.rl.remote import gather
from lockstep.rl.rollout.config import RolloutConfig
from lockstep.rl.rollout.loading import to_lockstep
from lockstep.rl.weight_sync.config import Transport
from lockstep.rl.workers.worker_groups import ModelGroup, RolloutGroup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=QUICKSTART_MODEL, help="a folder, a GGUF file, or a name on the Hub")
    parser.add_argument("--bucket-mib", type=float, nargs="+", default=[16.0, 64.0, 256.0])
    parser.add_argument("--transport", nargs="+", choices=["memory", "broadcast"], default=["memory", "broadcast"])
    parser.add_argument("--workers", type=int, default=1, help="rollout workers that receive")
    parser.add_argument("--times", type=int, default=5, help="syncs that count, after one that does not")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_cluster(None):
        checkpoint = to_lockstep(args.model, Path(folder))
        policy = ModelGroup(Layout(), threads=threads_for(1), trainer=TrainerConfig())
        gather(policy.start(checkpoint, "bfloat16", OptimizerConfig(), 1.0))
        for transport, mebibytes in product(args.transport, args.bucket_mib):
            measure(policy, checkpoint, transport, mebibytes, args.workers, args.times)


def measure(
    policy: ModelGroup, checkpoint: Path, transport: Transport, bucket_mib: float, workers: int, times: int
) -> None:
    limits = RolloutConfig(workers=workers, length=128, sequences=4, bucket_mib=bucket_mib, transport=transport)
    rollouts = RolloutGroup(limits, threads=threads_for(workers))
    gather(rollouts.start(checkpoint, "bfloat16"))
    size = sum(entry_bytes(entry) for entry in Checkpoint(checkpoint).tensors.values())
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        assert rollouts.receive(policy) == []
        seconds.append(time.perf_counter() - began)
    for number in range(workers):
        rollouts.end(number)
    median, copy = statistics.median(seconds[1:]), copied(size)
    print(
        f"{transport}: {size / 1e6:.0f} MB in messages of {bucket_mib:g} MiB to {workers} worker(s): {median:.3f} s "
        f"({', '.join(f'{s:.3f}' for s in seconds[1:])}), {size / median / 1e9:.2f} GB/s; "
        f"a copy takes {copy:.3f} s, {size / copy / 1e9:.2f} GB/s: {copy / median:.1%} of that"
    )


def entry_bytes(entry: dict[str, Any]) -> int:
    """Of a tensor in bf16."""
    return 2 * math.prod(entry["shape"])


def copied(size: int) -> float:
    """Seconds of a copy of so many bytes by one thread, best of several."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    found = []
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    main()
