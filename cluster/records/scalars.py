"""Writes scalars as TensorBoard's event files, line by line in the caller's thread.

The usual writer has a thread of its own, which dies with a traceback when the disk is full, and then hangs its caller.
"""

import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class ScalarWriter:
    """One event file in a folder; TensorBoard shows all files of a folder as one run."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._file = (folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}").open("ab")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))

    def add(self, values: dict[str, float], step: int) -> None:
        """Write values of one step, by tag; they are in the file when this returns."""
        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=found)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()
