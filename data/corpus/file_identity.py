"""Tells whether a file is the one that was read before: by a digest of its content, or by its stamp for a while."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

_READERS = 4
"""Files that are read at a time."""
_BLOCK = 1 << 22
"""Bytes of a file that are read at a time."""

Stamp = tuple[int, ...]
"""Size, times and inode of a file."""


def stamp(path: Path) -> Stamp:
    """What an edit of a file on this machine changes, whoever sets its times back: ctime is the kernel's own."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def content_digests(paths: Sequence[Path]) -> list[str]:
    """xxh3-128 of each file's bytes; disks, not digests, bound how long that takes."""
    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(_content_digest, paths))


def _content_digest(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
