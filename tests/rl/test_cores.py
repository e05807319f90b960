"""The cores of a process are those of its affinity and of its cgroups, which may grant less than the host has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.rl.cores import threads_for, usable_cores

COUNT = "from lockstep.rl.cores import usable_cores; print(usable_cores())"


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


def cgroups(root: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "mount" / name).write_text(text)
    (root / "own").write_text(own)
    return root / "mount", root / "own"


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {}, 64),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "250000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),
        ("0::/unseen/from/inside\n", {"cpu.max": "800000 100000\n"}, 8),
        (
            "4:cpu,cpuacct:/\n0::/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("4:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 64),
        ("3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_quotas_of_both_versions_count(tmp_path: Path, own: str, files: dict[str, str], cores: int) -> None:
    assert usable_cores(*cgroups(tmp_path, own, files)) == cores


def test_a_process_that_is_bound_to_a_core_has_one() -> None:
    one = min(os.sched_getaffinity(0))
    found = subprocess.run(
        [sys.executable, "-c", COUNT], preexec_fn=lambda: os.sched_setaffinity(0, {one}), capture_output=True
    )
    assert found.stdout == b"1\n", found.stderr
    assert threads_for(1) == usable_cores()
    assert threads_for(1000) == 1
