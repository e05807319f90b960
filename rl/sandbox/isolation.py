"""The set of active isolation mechanisms, as a comparable value that recipes can require, and limits of a run."""

from dataclasses import dataclass, fields
from typing import Self


class SandboxError(RuntimeError):
    """The sandbox does not start: the kernel refuses an isolation that is required, or its processes fail."""


@dataclass(frozen=True)
class Isolation:
    """Which of three Linux mechanisms are active; rlimits, closed descriptors and an empty environment always are."""

    namespaces: bool = True
    """Own user, processes, mounts, network, IPC and host name: no files but Python's, nobody to signal."""
    seccomp: bool = True
    """A list of allowed system calls: no new processes, programs or sockets, no signals, no tracing, no mounts."""
    landlock: bool = True
    """Files by a list as well: Python's to read, and the program's folder to write where namespaces made one."""

    def lacks(self, required: Self) -> tuple[str, ...]:
        """Names of the mechanisms that are required and not active."""
        return tuple(
            each.name for each in fields(self) if getattr(required, each.name) and not getattr(self, each.name)
        )

    def __str__(self) -> str:
        """One line, for the start of a run."""
        said = [f"{each.name} {'on' if getattr(self, each.name) else 'OFF'}" for each in fields(self)]
        return f"code sandbox: {', '.join(said)}"


NOTHING = Isolation(namespaces=False, seccomp=False, landlock=False)
USUAL = Isolation(landlock=False)
"""What a recipe requires unless it says otherwise: Landlock doubles what namespaces do, and not all kernels have it."""


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of one run of a program: all tests of a function are one run, and so is each case of input and output."""

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
