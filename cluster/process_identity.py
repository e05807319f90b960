"""Identifies a process by host, namespace, id and start, to tell later, or from elsewhere, whether it is gone."""

import os
import socket
from dataclasses import dataclass
from datetime import datetime

import psutil

JOB = "LOCKSTEP_JOB"
"""Variable in which rendered jobs name themselves: a scheduler runs each of them once at a time."""
CLOCK_S = 1.0
"""By how much two readings of one process's start may differ."""


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that others may ask for after it has ended."""

    host: str
    processes: int
    """Number of the namespace of process ids, which containers on one host do not share."""
    pid: int
    started: float
    """In seconds since 1970: a process id may come again, and a start does not."""
    job: str = ""
    """Of a scheduler, which has ended its processes before it runs the job again, wherever it does."""

    @classmethod
    def this_process(cls) -> "ProcessIdentity":
        """The process that asks."""
        pid = os.getpid()
        namespace, started = os.stat("/proc/self/ns/pid").st_ino, psutil.Process(pid).create_time()
        return cls(socket.gethostname(), namespace, pid, started, os.environ.get(JOB, ""))

    def is_gone(self) -> bool:
        """Whether the process has surely ended."""
        here = ProcessIdentity.this_process()
        if (self.host, self.processes) != (here.host, here.processes):
            return bool(self.job) and self.job == here.job
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > CLOCK_S
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started).isoformat(sep=" ", timespec="seconds")
        return f"process {self.pid} on {self.host}, which began at {since}"
