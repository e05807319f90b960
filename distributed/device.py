"""The device of a rank, its memory, and how megatron-core runs on a host without an accelerator.

megatron-core names the device "cuda" in its schedules and point-to-point communication. `megatron_device` gives it
the CPU instead, for the length of one call, and only on a host without an accelerator.
"""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of mallopt, as in malloc.h."""
PURGE_ALL_ARENAS = b"arena.4096.purge"
"""A name of jemalloc's mallctl; 4096 is MALLCTL_ARENAS_ALL."""


def local_device(rank: int = 0) -> torch.device:
    """The accelerator of a rank of the world, of hosts with equally many that fill up in turn; the CPU without any."""
    if torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("cpu")


def take_device(rank: int) -> None:
    """Make a rank's accelerator the current one, before anything is built on it; DeepSpeed takes it from LOCAL_RANK.

    A rank's number in the world is no device: the second host begins again with device 0, and where a launcher shows
    each process one device, that one is 0.
    """
    device = local_device(rank)
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to a device; an accelerator goes on computing, and the host need not wait for it.

    A plain copy from pageable memory returns when all that the device had to do before it is done. The allocator of
    page-locked memory keeps what is being copied.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of this process's tensors on an accelerator, or of the whole process on the CPU.

    On the CPU it is the peak resident size of Linux, VmHWM in proc_pid_status(5). `getrusage` reports another one: a
    process begins there with the peak of the process that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def keep_freed_memory() -> None:
    """Let glibc's allocator keep the memory of freed tensors for the next ones: mallopt(3).

    By default it gives large tensors back to the kernel after each operation and faults them in again, page by page,
    which doubles the time of all that is bound by memory. `give_back` still gives back what is asked for.
    """
    if sys.platform == "linux":
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            ctypes.CDLL(None).mallopt(parameter, value)


def give_back(device: torch.device) -> None:
    """Return cached free memory to the system: `torch.cuda.empty_cache`; on the CPU what the allocator has for it.

    That is jemalloc's arena.i.purge where the process was started with it, else malloc_trim(3) of glibc.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        allocator = ctypes.CDLL(None)
        if hasattr(allocator, "mallctl"):
            allocator.mallctl(PURGE_ALL_ARENAS, None, None, None, ctypes.c_size_t(0))
        else:
            allocator.malloc_trim(0)


class _CpuForCuda(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)


@contextmanager
def megatron_device() -> Iterator[None]:
    """Within this block megatron-core's "cuda" means the CPU where the host has no accelerator."""
    if torch.cuda.is_available():
        yield
        return
    current = patch.object(torch.cuda, "current_device", lambda: torch.device("cpu"))
    synchronize = patch.object(torch.cuda, "synchronize", lambda *args, **kwargs: None)
    with current, synchronize, _CpuForCuda():
        yield
