"""Base class of all workers: the object that one Ray actor runs, with log lines that name its role, rank and step."""

import logging
import os
import sys

from lockstep.rl.workers.agreement import Loaded, loaded, package_digest


class Worker:
    """The object that one process of a role runs."""

    role: str

    def __init__(self, rank: int) -> None:
        self.rank, self.step = rank, 0
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(self._tag)
        self.log = logging.getLogger("lockstep")
        self.log.handlers, self.log.propagate = [handler], False
        self.log.setLevel(logging.INFO)
        package_digest()  # now, when the sources are those that were imported

    def _tag(self, record: logging.LogRecord) -> bool:
        record.msg = f"[{self.role} {self.rank} step {self.step}] {record.levelname.lower()}: {record.msg}"
        return True

    def loaded(self) -> Loaded:
        """What this process works with, to be compared with what others do."""
        return loaded()

    def pid(self) -> int:
        """ID of the worker's process."""
        return os.getpid()
