"""What decides the bits of a run beside its row: the sources, the kind of machine, and versions of what computes."""

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict

import lockstep
from lockstep.model.ops.cpu.library import compiler_command, compiler_version
from lockstep.rl.cores import usable_cores
from result_table.methods import ROOT

SOURCES = (
    *("data", "distributed", "model", "rl", "cluster", "recipes", "src"),
    "benchmarks/result_table/methods.py",
)
"""What a run depends on; a commit that changes nothing of it makes no row old."""
INSTRUCTIONS = (
    *("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile"),  # x86
    *("asimd", "bf16", "i8mm", "sve", "sve2"),  # Arm
)
"""Sets by which libraries choose their kernels, as Linux names them."""
PACKAGES = ("torch", "numpy", "deepspeed", "megatron-core", "tokenizers", "reasoning-gym", "math-verify")
CHOOSING = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_")
"""How names of variables begin by which users choose kernels."""
CORES = 2
"""Cores that a run has on any machine: each process has a thread for each of its cores, and threads order sums."""


class Machine(BaseModel):
    """A kind of machine: others of it are expected to compute the same bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processor: str
    instructions: tuple[str, ...]
    cores: int
    """That a run may use."""

    def __str__(self) -> str:
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{self.processor} ({', '.join(self.instructions) or 'plain'}), {cores}"


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """The kind of this machine, with the cores that this thread may use."""
    first = cpuinfo.read_text().split("\n\n")[0] if cpuinfo.exists() else ""
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    names = (("", "model name"), ("family ", "cpu family"), ("model ", "model"), ("part ", "CPU part"))
    words = [f"{label}{said[name]}" for label, name in names if said.get(name)]
    flags = (said.get("flags") or said.get("Features") or "").split()
    found = tuple(each for each in INSTRUCTIONS if each in flags)
    return Machine(processor=" ".join(words) or platform.machine(), instructions=found, cores=usable_cores())


@contextmanager
def few_cores(count: int = CORES) -> Iterator[None]:
    """Leave this thread, and what it starts, so many of its cores; all of them again afterwards."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def versions() -> dict[str, str]:
    """Versions of Python, packages, compiler and C library, and variables that choose kernels."""
    found = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    found |= {"compiler": _compiler(), "libc": " ".join(platform.libc_ver())}
    return found | {name: os.environ[name] for name in sorted(os.environ) if name.startswith(CHOOSING)}


def _compiler() -> str:
    """The C compiler that makes the kernels of rollouts and of exact numerics."""
    said = compiler_version(compiler_command())
    return "none" if said is None else said.decode(errors="replace").partition("\n")[0]


def commit() -> str:
    """The last commit that changed `SOURCES`; what is not committed of them follows as `+` and a digest.

    Raises:
        ValueError: where there is no repository, or Python imports another Lockstep than that of this one.
    """
    imported = Path(lockstep.__file__).resolve().parent
    if imported != ROOT / "src" / "lockstep":
        raise ValueError(f"Python imports Lockstep from {imported}, and a row is of {ROOT}: install that one")
    last = _git("log", "-1", "--format=%H", "--", *SOURCES).strip()
    changes = _git("diff", "HEAD", "--", *SOURCES) + _git("status", "--porcelain", "--", *SOURCES)
    return f"{last}+{xxhash.xxh3_64_hexdigest(changes.encode())}" if changes else last


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise ValueError(f"a row says its commit, and git does not ({said}): make rows in a clone") from error
