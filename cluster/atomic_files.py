"""Whole files, whole lines."""

import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write content to path so that a reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def cut_half_line(path: Path) -> None:
    """Drop what a killed writer left after the last newline, so that the next line starts a line."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
