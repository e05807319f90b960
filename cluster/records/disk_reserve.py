"""Keeps some room on the disk of a run, so that its end can be written down when the disk is full."""

import os
from pathlib import Path
from types import TracebackType

RESERVE = 1 << 20
"""Bytes: a summary and a report."""


class DiskReserve:
    """A file without a purpose but its size, which is there within a `with` block."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".reserve"

    def __enter__(self) -> "DiskReserve":
        with self._path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
