"""Storage of checkpoints: a folder, or a prefix of a key-value store that TensorStore opens, such as S3.

A folder is published under its name when all is in it. A prefix cannot be renamed: what is in it counts as soon as the
last file is there, which nobody may write before the others.
"""

import ctypes
import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tensorstore

from lockstep.distributed.checkpoint.file_names import checked_name, path_inside


class BadStorage(ValueError):
    """A URL that names no key-value store."""


class Storage(Protocol):
    """A folder, or a prefix of a key-value store. Names are of files and folders in it; others raise `BadName`."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """The last part of its path."""
        ...

    def __truediv__(self, name: str) -> "Storage":
        """The subfolder of that name."""
        ...

    @property
    def kvstore(self) -> Any:
        """TensorStore's JSON spec of the key-value store at this path."""
        ...

    def has(self, name: str) -> bool:
        """Whether a file of this name exists."""
        ...

    def holding(self, name: str) -> list[str]:
        """Names of the subfolders that have a file of this name."""
        ...

    def read(self, name: str) -> str:
        """The text of a file.

        Raises:
            FileNotFoundError: when there is none.
        """
        ...

    def write(self, name: str, text: str) -> None:
        """Write a text file atomically; returns when it is on disk."""
        ...

    def sync(self, *names: str) -> None:
        """Flush files of these names to disk (fsync); without names, the folder's own entries."""
        ...

    def remove(self, last: str = "") -> None:
        """Remove the folder, first of all the file `last`, without which readers take it for incomplete."""
        ...

    def begin(self, name: str, like: str, last: str) -> None:
        """Create an empty draft of the folder `name`; remove drafts that were never published.

        Args:
            like: how the names of drafts begin.
            last: the file that every published folder has.
        """
        ...

    def draft(self, name: str) -> "Storage":
        """The draft folder of `name`, to write into."""
        ...

    def publish(self, name: str) -> None:
        """Move a draft to its name atomically, replacing what was there."""
        ...

    def point(self, link: str, name: str) -> None:
        """Let the link `link` point to the subfolder `name`."""
        ...

    def pointed(self, link: str) -> str | None:
        """The name of the subfolder that a link points to, or None."""
        ...

    def unlink(self, link: str) -> None:
        """Remove a link, if it exists."""
        ...


def storage_of(where: "str | Path | Storage") -> Storage:
    """The storage at a path or URL; a URL may also be TensorStore's JSON, such as {"driver": "s3", "endpoint": …}.

    Raises:
        BadStorage: when TensorStore knows no such key-value store.
    """
    if isinstance(where, Path):
        return Folder(where)
    if not isinstance(where, str):
        return where
    if not is_url(where):
        return Folder(Path(where))
    try:
        spec = tensorstore.KvStore.Spec(json.loads(where) if where.startswith("{") else where).to_json()
    except ValueError as error:
        raise BadStorage(f"{where} is no key-value store: {str(error).splitlines()[0]}") from error
    spec["path"] = spec.get("path", "").rstrip("/") + "/"
    return Prefix(json.dumps(spec))


def is_url(where: str) -> bool:
    """Whether a text names a key-value store rather than a path."""
    return "://" in where or where.startswith("{")


@dataclass(frozen=True)
class Folder:
    """Storage in a folder of a file system that all ranks share."""

    path: Path

    @property
    def name(self) -> str:
        """See `Storage`."""
        return self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.path / checked_name(name, self))

    @property
    def kvstore(self) -> Any:
        """See `Storage`."""
        return {"driver": "file", "path": f"{self.path}/"}

    def has(self, name: str) -> bool:
        """See `Storage`."""
        return path_inside(self.path, name, self).is_file()

    def holding(self, name: str) -> list[str]:
        """See `Storage`."""
        return sorted(path.parent.name for path in self.path.glob(f"*/{name}"))

    def read(self, name: str) -> str:
        """See `Storage`."""
        return path_inside(self.path, name, self).read_text(encoding="utf-8")

    def write(self, name: str, text: str) -> None:
        """See `Storage`."""
        path = self.path / checked_name(name, self)
        self.path.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)

    def sync(self, *names: str) -> None:
        """See `Storage`."""
        for path in [self.path / name for name in names] or [self.path]:
            sync(path)

    def remove(self, last: str = "") -> None:
        """See `Storage`."""
        going = self.path.with_name(f"{self.name}.partial")
        self.path.rename(going)
        shutil.rmtree(going)

    def begin(self, name: str, like: str, last: str) -> None:
        """See `Storage`."""
        for left in self.path.glob(f"{like}*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        self.draft(name).path.mkdir(parents=True)

    def draft(self, name: str) -> "Folder":
        """See `Storage`."""
        return self / f"{name}.partial"

    def publish(self, name: str) -> None:
        """See `Storage`. Files are on disk already, the folders that list them may not be."""
        draft, final = self.draft(name).path, self.path / name
        for folder in (draft, *(path for path in draft.iterdir() if path.is_dir())):
            sync(folder)
        if final.exists():
            _exchange(draft, final)
            shutil.rmtree(draft)
        else:
            draft.rename(final)
        self.sync()

    def point(self, link: str, name: str) -> None:
        """See `Storage`."""
        new = self.path / f"{link}.{os.getpid()}"
        new.unlink(missing_ok=True)
        new.symlink_to(name)
        new.replace(self.path / link)
        self.sync()

    def pointed(self, link: str) -> str | None:
        """See `Storage`."""
        path = self.path / link
        return path.resolve().name if path.exists() else None

    def unlink(self, link: str) -> None:
        """See `Storage`."""
        (self.path / link).unlink(missing_ok=True)


@dataclass(frozen=True)
class Prefix:
    """Storage under a prefix of a key-value store's keys."""

    spec: str
    """TensorStore's JSON spec of the store, with a `path` that ends with a slash."""

    @property
    def name(self) -> str:
        """See `Storage`."""
        return str(self.kvstore["path"].rstrip("/").rpartition("/")[2])

    def __str__(self) -> str:
        spec = self.kvstore
        bucket = f"{spec['bucket']}/" if "bucket" in spec else ""
        return f"{spec['driver']}://{bucket}{spec['path']}".rstrip("/")

    def __truediv__(self, name: str) -> "Prefix":
        here = self.kvstore
        return Prefix(json.dumps(here | {"path": f"{here['path']}{checked_name(name, self)}/"}))

    @property
    def kvstore(self) -> Any:
        """See `Storage`."""
        return json.loads(self.spec)

    def has(self, name: str) -> bool:
        """See `Storage`."""
        return self._found(name) is not None

    def holding(self, name: str) -> list[str]:
        """See `Storage`. Lists all keys, since stores list no folders."""
        depth = (key.decode().split("/") for key in self._store.list().result())
        return sorted(parts[0] for parts in depth if parts[1:] == [name])

    def read(self, name: str) -> str:
        """See `Storage`."""
        found = self._found(name)
        if found is None:
            raise FileNotFoundError(f"{self}/{name} does not exist")
        return found.decode("utf-8")

    def write(self, name: str, text: str) -> None:
        """See `Storage`."""
        self._store.write(checked_name(name, self), text.encode("utf-8")).result()

    def sync(self, *names: str) -> None:
        """See `Storage`. A write is durable when it returns."""

    def remove(self, last: str = "") -> None:
        """See `Storage`."""
        if last:
            self.unlink(last)
        self._store.delete_range(tensorstore.KvStore.KeyRange()).result()

    def begin(self, name: str, like: str, last: str) -> None:
        """See `Storage`."""
        keys = [key.decode().split("/") for key in self._store.list().result()]
        whole = {parts[0] for parts in keys if parts[1:] == [last]} - {name}
        for left in {parts[0] for parts in keys if parts[1:] and parts[0].startswith(like)} - whole:
            (self / left).remove(last)

    def draft(self, name: str) -> "Prefix":
        """See `Storage`. Keys cannot be renamed: a draft is written under its final name."""
        return self / name

    def publish(self, name: str) -> None:
        """See `Storage`. Nothing to do: a folder counts as soon as its last file exists."""

    def point(self, link: str, name: str) -> None:
        """See `Storage`. A link is a file that holds the name."""
        self.write(link, name)

    def pointed(self, link: str) -> str | None:
        """See `Storage`."""
        found = self._found(link)
        return None if found is None else found.decode("utf-8")

    def unlink(self, link: str) -> None:
        """See `Storage`."""
        self._store.delete_range(tensorstore.KvStore.KeyRange(link, f"{link}\0")).result()

    @property
    def _store(self) -> Any:
        return _opened(self.spec)

    def _found(self, name: str) -> bytes | None:
        found = self._store.read(checked_name(name, self)).result()
        return bytes(found.value) if found.state == "value" else None


@functools.cache
def _opened(spec: str) -> Any:
    return tensorstore.KvStore.open(json.loads(spec)).result()


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk: fsync(2)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> None:
    """Swap the names of two folders atomically: renameat2(2) with RENAME_EXCHANGE."""
    here, exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange):
        raise OSError(ctypes.get_errno(), f"{b} exists and cannot be replaced: {os.strerror(ctypes.get_errno())}")
