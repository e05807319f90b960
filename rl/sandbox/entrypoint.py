"""Starts a zygote: imports what programs need, then enters new namespaces where the kernel grants them."""

import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from lockstep.rl.sandbox.harness import pytest_subset
from lockstep.rl.sandbox.isolation import Isolation, SandboxLimits
from lockstep.rl.sandbox.libraries import LibraryFinder
from lockstep.rl.sandbox.linux import libc
from lockstep.rl.sandbox.linux.child import open_processes
from lockstep.rl.sandbox.linux.jail import Jail, build_root, map_users, unshare_all
from lockstep.rl.sandbox.zygote import Zygote

# fmt: off
_WARM = (
    "abc", "array", "atexit", "base64", "binascii", "bisect", "builtins", "calendar", "cmath", "collections",
    "collections.abc", "contextlib", "copy", "csv", "datetime", "decimal", "enum", "fractions", "functools",
    "hashlib", "heapq", "inspect", "io", "itertools", "json", "keyword", "locale", "math", "numbers", "operator",
    "os", "pickle", "platform", "pprint", "queue", "random", "re", "secrets", "signal", "statistics", "string",
    "struct", "sys", "textwrap", "threading", "time", "timeit", "traceback", "types", "typing", "unittest",
    "unittest.mock", "urllib.parse", "uuid", "weakref", "zlib",
)
# fmt: on
"""Modules that programs often import, loaded once before any fork."""
_DESCRIPTORS = 256


def serve(connection: int, uses: Isolation, limits: SandboxLimits, libraries: list[str]) -> None:
    """Isolates this process, reports how, then runs the zygote's loop until the pool closes the connection.

    Args:
        libraries: files and folders beside Python's own; see `distributions.located`.
    """
    control = _renumbered(connection)
    _settle()
    sys.meta_path.append(LibraryFinder(libraries))
    refused, processes = "", open_processes()

    def loop(refused: str = "", namespaces: bool = uses.namespaces) -> None:
        jail = Jail(replace(uses, namespaces=namespaces), limits, libraries)
        Zygote(control, jail, limits, processes).serve(refused)

    if uses.namespaces:
        refused = _enter_namespaces(loop, limits.folder_bytes, libraries)
    loop(refused, namespaces=False)


def _renumbered(connection: int) -> socket.socket:
    """The connection, as the lowest number: a pool's process of many files hands down one that no limit would close."""
    control = socket.socket(fileno=os.dup(connection))
    os.close(connection)
    return control


def _settle() -> None:
    """Warm modules, few descriptors, and the first place among those that are killed when memory is short."""
    for name in _WARM:
        importlib.import_module(name)
    sys.modules["pytest"] = pytest_subset.module({})
    sys.argv = ["program.py"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, _DESCRIPTORS))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.umask(0o022)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignored it would have left us no child to wait for
    gc.collect()
    gc.freeze()
    gc.disable()


def _enter_namespaces(loop: Callable[[], None], folder_bytes: int, libraries: list[str]) -> str:
    """Never returns where the kernel grants namespaces: a grandchild runs `loop` in them. Else what was refused."""
    (ready, say_ready), (go, say_go), (trouble, say_trouble) = os.pipe(), os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        _live(lambda: _unshared(loop, folder_bytes, libraries, (say_ready, go, say_trouble)), say_trouble)
    for descriptor in (say_ready, go, say_trouble):
        os.close(descriptor)
    with suppress(OSError):
        if os.read(ready, 1):
            map_users(child)
            os.write(say_go, b"m")
    os.close(say_go)
    os.close(ready)
    with open(trouble) as report:
        problem = report.read()
    status = os.waitpid(child, 0)[1]
    if not problem:
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    return problem


def _unshared(loop: Callable[[], None], folder_bytes: int, libraries: list[str], pipes: tuple[int, int, int]) -> int:
    """The process between: in the new namespaces but for that of processes, whose first process is its child."""
    say_ready, go, say_trouble = pipes
    libc.die_with_parent(signal.SIGKILL)
    unshare_all(say_ready, go)
    child = os.fork()
    if child == 0:
        _live(lambda: _first_inside(loop, folder_bytes, libraries, pipes), say_trouble)
    os.close(say_trouble)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF


def _first_inside(
    loop: Callable[[], None], folder_bytes: int, libraries: list[str], pipes: tuple[int, int, int]
) -> int:
    libc.die_with_parent(signal.SIGKILL)
    build_root(folder_bytes, libraries)
    for descriptor in pipes:
        os.close(descriptor)
    try:
        loop()
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _live(life: Callable[[], int], say_trouble: int) -> NoReturn:
    """Runs a forked process to its end; the message of an exception is written to `say_trouble`."""
    code = 70
    try:
        code = life()
    except Exception as error:
        os.write(say_trouble, str(error).encode())
    finally:
        os._exit(code)


def main() -> None:
    """Entry point of the zygote's process: the arguments are its connection and its settings."""
    connection, settings = int(sys.argv[1]), json.loads(sys.argv[2])
    uses, limits = Isolation(**settings["uses"]), SandboxLimits(**settings["limits"])
    serve(connection, uses, limits, settings["libraries"])
