"""What a process reports as its peak of memory is its own, and stays."""

import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch

from lockstep.distributed.device import local_device, peak_memory, take_device
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from tests.distributed.world.test_rank_pool import step_of_a_tiny_model

CPU = torch.device("cpu")
REPORT = "import torch; from lockstep.distributed.device import peak_memory; print(peak_memory(torch.device('cpu')))"


def test_a_peak_remains_when_its_memory_is_gone_and_no_child_inherits_it() -> None:
    before = peak_memory(CPU) - psutil.Process().memory_info().rss  # of tests that ran in this process
    held = np.ones((before >> 3) + (1 << 27))
    peak = peak_memory(CPU)
    assert peak > held.nbytes
    assert abs(peak - psutil.Process().memory_info().rss) < peak / 10
    del held
    assert peak_memory(CPU) > peak * 0.999  # the kernel sums its counters of pages lazily
    child = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, check=True, text=True)
    assert 0 < int(child.stdout) < peak - (1 << 28)


def memory_with_a_full_last_rank(groups: Groups) -> tuple[float, float]:
    """What this rank holds, and what a step reports; the last rank holds 200 MB more than any other."""
    held = np.ones(25_000_000) if groups.rank == groups.layout.processes - 1 else None
    reported = step_of_a_tiny_model(groups).values["memory_gb"]
    del held
    return peak_memory(CPU) / 1e9, reported


def test_a_step_reports_the_fullest_rank(worlds: RankPool) -> None:
    own, reported = zip(*worlds.run(Layout(pipeline=2), memory_with_a_full_last_rank), strict=True)
    assert reported[0] == reported[1]
    assert abs(reported[0] - own[1]) < 0.01


FAULTS = """
import resource, sys, torch
from lockstep.distributed.device import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(20):
    if turn == 10:  # the heap has grown by then
        begun = faults()
    torch.ones(8 << 20)  # 32 MiB
print(faults() - begun)
"""


def test_freed_memory_is_used_again() -> None:
    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, how], stdout=subprocess.PIPE, check=True).stdout)

    pages = (32 << 20) // 4096
    assert faults("keep") < pages
    assert faults("leave") > 9 * pages, "the library behaves as well alone"


@pytest.mark.parametrize(("rank", "visible", "index"), [(0, 8, 0), (7, 8, 7), (8, 8, 0), (13, 4, 1), (5, 1, 0)])
def test_a_ranks_device_is_one_of_its_host(
    rank: int, visible: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With devices that are only said to be there."""
    taken: list[torch.device] = []
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    take_device(rank)
    assert taken == [local_device(rank)] == [torch.device("cuda", index)]
    assert os.environ["LOCAL_RANK"] == str(index)
