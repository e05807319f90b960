"""What keeps an untrusted program in: a value, so that it can be printed, compared and demanded."""

from dataclasses import dataclass, fields
from typing import Self


class SandboxError(RuntimeError):
    """The sandbox cannot be had: the kernel refuses what is required, or its processes do not start."""


@dataclass(frozen=True)
class Isolation:
    """Three walls of Linux; limits, closed descriptors, an empty environment and the final kill come always."""

    namespaces: bool = True
    """Own user, processes, mounts, network, IPC and host name: no files but Python's, nobody to signal."""
    seccomp: bool = True
    """A list of allowed system calls: no new processes, programs or sockets, no signals, no tracing, no mounts."""
    landlock: bool = True
    """Files by a list as well: Python's to read, and the program's folder to write where namespaces made one."""

    def lacks(self, required: Self) -> tuple[str, ...]:
        """Names of the walls that are required and not here."""
        return tuple(
            wall.name for wall in fields(self) if getattr(required, wall.name) and not getattr(self, wall.name)
        )

    def __str__(self) -> str:
        """One line, for the start of a run."""
        walls = [f"{wall.name} {'on' if getattr(self, wall.name) else 'OFF'}" for wall in fields(self)]
        return f"code sandbox: {', '.join(walls)}"


NOTHING = Isolation(namespaces=False, seccomp=False, landlock=False)
USUAL = Isolation(landlock=False)
"""What a recipe requires unless it says otherwise: Landlock doubles what namespaces do, and not all kernels have it."""


@dataclass(frozen=True)
class SandboxLimits:
    """What one run of a program may use: the whole of a function's tests is one run, and so is each case."""

    seconds: float = 5.0
    """On a processor, for the whole of a run; also how long it may do nothing at all, and without seccomp wall time."""
    memory_bytes: int = 1 << 30
    """Address space; Python itself takes some 100 MiB of it."""
    folder_bytes: int = 16 << 20
    """Of all files in its folder, which is memory; without namespaces there is no folder."""
    output_bytes: int = 4 << 20
    """Of what it prints, and of each value that it returns."""
    threads: int = 32

    def __post_init__(self) -> None:
        least = {
            "seconds": 0.01,
            "memory_bytes": 1 << 28,
            "folder_bytes": 1 << 12,
            "output_bytes": 1 << 10,
            "threads": 1,
        }
        for name, lowest in least.items():
            if not getattr(self, name) >= lowest:
                raise ValueError(f"SandboxLimits.{name} is {getattr(self, name)}: give {lowest} or more")
