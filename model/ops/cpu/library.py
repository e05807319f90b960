"""Compiles `kernels.c` for this processor, loads it, and runs its functions in torch's OpenMP threads."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

NUMBERS = {torch.bfloat16: "uint16_t", torch.float32: "float"}
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
ALONE = 1 << 14
"""Numbers that one thread works through before another one would have begun."""


def run(name: str, job: ctypes.Structure, dtype: torch.dtype, *, size: int) -> None:
    """Call a kernel in torch's OpenMP threads, or in this thread alone where its size in elements is small."""
    team, threads = _team(), threads_for(size)
    function = getattr(loaded(dtype), name)
    if threads == 1 or team is None:
        function(ctypes.byref(job))
    else:
        team(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(job), threads, 0)


def threads_for(size: int) -> int:
    """The number of threads for a kernel call over so many elements."""
    return 1 if size < ALONE or _team() is None else torch.get_num_threads()


def loaded(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled library of a dtype, which must exist: see `kernels.usable`."""
    library = library_of(dtype)
    assert library is not None
    return library


@cache
def _team() -> Any:
    """GOMP_parallel of torch's own OpenMP: other threads would compete with torch's, which spin."""
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return function


@cache
def library_of(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Compile `kernels.c` for a dtype, or take it from the user's cache; None where it cannot be compiled."""
    source = Path(__file__).with_name("kernels.c")
    words = [os.environ.get("CC", "cc"), *FLAGS, f"-DNUMBER={NUMBERS[dtype]}"]
    try:
        version = subprocess.run([words[0], "--version"], check=True, capture_output=True).stdout
        name = hashlib.sha256(b"\0".join([source.read_bytes(), *map(str.encode, words), version, _processor()]))
        path = _folder() / f"kernels-{name.hexdigest()[:16]}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder) / "kernels.so"
                subprocess.run([*words, str(source), "-o", str(made), "-lm"], check=True, capture_output=True)
                made.replace(path)  # whole or not at all, whoever else compiles it
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> bytes:
    """The processor's features, as part of the cache key: machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")


def _folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
