"""Compiles `kernels.c` for this processor, loads it, and runs its functions in torch's OpenMP threads."""

import ctypes
import hashlib
import logging
import os
import shlex
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)
NUMBERS = {torch.bfloat16: "uint16_t", torch.float32: "float"}
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
ALONE = 1 << 14
"""Numbers that one thread works through before another one would have begun."""


def run(name: str, job: ctypes.Structure, dtype: torch.dtype, *, size: int) -> None:
    """Call a kernel in torch's OpenMP threads, or in this thread alone where its size in elements is small."""
    threads = 1 if size < ALONE else torch.get_num_threads()
    function, openmp = getattr(loaded(dtype), name), _openmp()
    if threads == 1 or openmp is None:
        function(ctypes.byref(job))
    else:
        openmp.GOMP_parallel(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(job), threads, 0)


def team_size() -> int | None:
    """Address of a C function that counts the threads of the call it is in; None where each call has one thread."""
    openmp = _openmp()
    return None if openmp is None else ctypes.cast(openmp.omp_get_num_threads, ctypes.c_void_p).value


def loaded(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled library of a dtype, which must exist: see `kernels.usable`."""
    library = library_of(dtype)
    assert library is not None
    return library


@cache
def _openmp() -> ctypes.CDLL | None:
    """Torch's own OpenMP runtime: threads of another one would compete with torch's, which spin."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.omp_get_num_threads.argtypes = []
    except (OSError, AttributeError):
        return None
    return library


@cache
def library_of(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Load `kernels.c`, compiled for a dtype now or earlier; None, said in a warning, where that is impossible.

    Compiled libraries are kept in the user's cache. Without a compiler the newest one of the same source is taken.
    """
    source = Path(__file__).with_name("kernels.c")
    compiler = compiler_command()
    words = [*FLAGS, f"-DNUMBER={NUMBERS[dtype]}"]
    key = _digest(source.read_bytes(), *map(str.encode, words), _processor())
    try:
        folder = _cache_folder()
        version = compiler_version(compiler)
        if version is None:
            return _newest(folder, key)
        path = folder / f"kernels-{key}-{_digest(version)}.so" if folder else None
        if path is not None and _is_private(path):
            return ctypes.CDLL(str(path))
        kept = path if os.access(folder or "", os.W_OK) else None
        return _compiled([*compiler, *words, str(source)], kept)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode(errors="replace").strip() if isinstance(error, subprocess.CalledProcessError) else ""
        log.warning(
            "kernels are not compiled for %s (%s): torch's operations take their place, slower and, in exact numerics, "
            "with other bits than where kernels are: install a C compiler, or name one in CC",
            str(dtype).removeprefix("torch."),
            " ".join((said or str(error)).split())[:300],
        )
        return None


def _compiled(command: list[str], path: Path | None) -> ctypes.CDLL:
    """Compile and load a library, and keep it at a path, whole or not at all, whoever else compiles it."""
    with tempfile.TemporaryDirectory(dir=path and path.parent) as folder:
        made = Path(folder) / "kernels.so"
        subprocess.run([*command, "-o", str(made), "-lm"], check=True, capture_output=True)
        made.chmod(0o700)  # whatever the umask: see `_is_private`
        library = ctypes.CDLL(str(made))
        if path is not None:
            made.replace(path)
        return library


def _newest(folder: Path | None, key: str) -> ctypes.CDLL:
    """The library that was compiled last of a source and processor.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [path for path in (folder.glob(f"kernels-{key}-*.so") if folder else ()) if _is_private(path)]
    if not found:
        raise FileNotFoundError("there is no C compiler, and none was here before")
    return ctypes.CDLL(str(max(found, key=lambda path: path.stat().st_mtime)))


def compiler_command() -> list[str]:
    """The words by which the C compiler is called: those of CC, or cc."""
    return shlex.split(os.environ.get("CC") or "cc")


def compiler_version(compiler: list[str]) -> bytes | None:
    """What a C compiler says of its version; None where there is none."""
    try:
        return subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """The processor's features, as part of the cache key: machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")


def _cache_folder() -> Path | None:
    """The user's cache of compiled libraries; None where there is none that other users cannot write to."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o700)
        return folder if _is_private(folder) else None
    except (OSError, RuntimeError):  # the latter of a user without a home
        return None


def _is_private(path: Path) -> bool:
    """Whether only this user, or root, can have written a file or folder: code of others is not loaded."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return found.st_uid in (0, os.getuid()) and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o022
