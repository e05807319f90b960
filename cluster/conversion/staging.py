"""The staging folder of a conversion, `DST.partial`: its settings, a journal of finished tasks, and the content.

It takes its final name when everything is on disk; killed before, the same command goes on where it stopped.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.storage import Storage, sync


class BadTarget(ValueError):
    """A destination that cannot be written to."""


CONTENT = "content"
"""Inside of `DST.partial`: what becomes DST."""


def partial_folder(destination: Path | Storage) -> Path:
    """The staging folder `DST.partial`; in the working directory where DST is in a key-value store."""
    beside = destination if isinstance(destination, Path) else Path(destination.name)
    return beside.with_name(f"{beside.name}.partial")


def content_of(destination: Path | Storage) -> Path | Storage:
    """Where parts are written. A store has no folders to rename, and gets them under their final names."""
    return partial_folder(destination) / CONTENT if isinstance(destination, Path) else destination


def check_destination(destination: Path | Storage) -> None:
    """Refuse a destination that exists."""
    if destination.exists() if isinstance(destination, Path) else manager.exists(destination):
        raise BadTarget(f"{destination} exists: give a folder that does not")


class Staging:
    """The staging folder `DST.partial`, locked by this process."""

    def __init__(self, destination: Path | Storage, begun_with: dict[str, Any]) -> None:
        """
        Args:
            begun_with: what must be the same for the work of an earlier process to be of use.

        Raises:
            BadTarget: when another process writes there, or an earlier one began otherwise.
        """
        self._destination = destination
        self._folder = partial_folder(destination)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal = open(self._folder / "done.jsonl", "a+")  # noqa: SIM115
        self._lock()
        self._agree(begun_with)
        self.done = self._read()

    def record(self, task: int, digests: list[str]) -> None:
        """Append a task to the journal once its parts are on disk."""
        self._journal.write(json.dumps({"task": task, "digests": digests}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def commit(self) -> None:
        """Rename the content to its final name and remove the staging folder."""
        content = content_of(self._destination)
        if isinstance(content, Path) and isinstance(self._destination, Path):
            for path in (*content.rglob("*"), content):
                if not path.is_symlink():
                    sync(path)
            content.rename(self._destination)
            sync(self._destination.parent)
        shutil.rmtree(self._folder)
        self.close()

    def close(self) -> None:
        """Release the lock."""
        self._journal.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise BadTarget(f"{self._folder} is being written by another process: wait for it, or end it") from error

    def _agree(self, begun_with: dict[str, Any]) -> None:
        note = self._folder / "conversion.json"
        if not note.exists():
            temporary = note.with_suffix(".new")
            temporary.write_text(json.dumps(begun_with, indent=2))
            temporary.replace(note)
        before = json.loads(note.read_text())
        changed = [key for key in begun_with if before.get(key) != begun_with[key]]
        if changed:
            self.close()
            raise BadTarget(
                f"{self._folder} was begun with {changed[0]}={before.get(changed[0])}, and now it is "
                f"{begun_with[changed[0]]}: remove the folder to begin anew, or repeat the command that began it"
            )

    def _read(self) -> dict[int, list[str]]:
        """Tasks that are done; a last line that was cut off is not, and goes."""
        self._journal.seek(0)
        text = self._journal.read()
        whole = text[: text.rfind("\n") + 1]
        self._journal.truncate(len(whole.encode()))
        lines = [json.loads(line) for line in whole.splitlines()]
        return {line["task"]: line["digests"] for line in lines}
