"""Processor cores that a process may use: its affinity and the quotas of its cgroup, not all that the host has."""

import os
from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Cores that this process may use at the same time, at least 1: sched_getaffinity(2), cpu.max or cpu.cfs_quota_us.

    Args:
        cgroups: where cgroups are mounted, of version 1 or 2.
        own: the file that names this process's cgroups.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas(cgroups, own))]))


def threads_for(processes: int) -> int:
    """Threads for each of so many processes that compute at the same time on this host."""
    return max(1, usable_cores() // processes)


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """Cores that this process's cgroups grant, those above them included; none where they grant all."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        path = Path(name.lstrip("/"))
        for folder in (path, *path.parents):  # a container sees its own cgroup at the mount, whatever its name is
            found += [quota for at in _mounts(cgroups, controllers) if (quota := _quota(at / folder)) is not None]
    return found


def _mounts(cgroups: Path, controllers: str) -> list[Path]:
    """Where a hierarchy is mounted: that of version 2 has no controllers in its name."""
    return [cgroups / controllers, cgroups / "cpu"] if controllers else [cgroups, cgroups / "unified"]


def _quota(folder: Path) -> float | None:
    """Cores that a cgroup grants; None where that is not limited, or not said."""
    try:
        if (limit := folder / "cpu.max").exists():
            quota, period = limit.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # "max" is no number
        return None
