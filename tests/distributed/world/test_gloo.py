"""All process groups of a process share one gloo device, and with it one thread that polls and one port."""

from pathlib import Path

import torch
import torch.distributed as dist

from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool


def polling_threads(groups: Groups) -> tuple[int, float, float]:
    """How many threads of gloo poll, and sums over two groups of which one is made later."""
    later = dist.new_group()
    sums = [torch.tensor([float(2**groups.rank)]) for _ in range(2)]
    for values, group in zip(sums, (groups.replicas, later), strict=True):
        dist.all_reduce(values, group=group)
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop"), sums[0].item(), sums[1].item()


def test_one_thread_polls_for_all_groups(worlds: RankPool) -> None:
    assert worlds.run(Layout(tensor=2, data=2), polling_threads) == [(1, 5.0, 15.0), (1, 10.0, 15.0)] * 2
