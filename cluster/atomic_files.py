"""Writes files atomically: a reader or a restarted process never meets half a file or half a line."""

import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write content to path by renaming a temporary file: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def cut_half_line(path: Path) -> None:
    """Truncate a file after its last newline, so that what a killed writer left unfinished is gone."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
