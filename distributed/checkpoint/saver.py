"""Saves checkpoints from all ranks, optionally in the background: each rank writes its chunks into a draft folder.

Each then writes a list of its chunks; when all lists are there, rank 0 writes the manifest and publishes the draft.
Ranks communicate through these files only, so that training may go on meanwhile.
"""

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lockstep.distributed.checkpoint.arrays import Chunk, Entry, merged, write
from lockstep.distributed.checkpoint.manager import FORMAT, MANIFEST, STEP, saved, step_name
from lockstep.distributed.checkpoint.storage import Storage, storage_of

POLL_S, LONGEST_POLL_S = 0.02, 1.0
"""Seconds between two looks of rank 0 for the lists of other ranks; it grows with each look up to the second."""
FAILED = "failed"
"""The file that a rank writes when it could not write its chunks."""


class CheckpointConfig(BaseModel):
    """When checkpoints are saved, where, and which are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: Annotated[str, Path] = Field(
        "",
        description="where they go, if not into the run: a folder, or a URL that TensorStore opens, such as "
        "s3://bucket/{name}; {name} stands for the recipe's name",
    )
    every: int = Field(0, ge=0, description="steps between checkpoints; 0 saves one at the end")
    keep_last: int = Field(0, ge=0, description="how many of the newest stay; 0 for all")
    keep_every: int = Field(0, ge=0, description="checkpoints of multiples of so many steps stay as well; 0 for none")
    grace: float = Field(
        120.0,
        ge=0,
        description="seconds for the last step and checkpoint of a run that is told to end by SIGTERM or Ctrl-C",
    )
    asynchronous: bool = Field(True, description="train on while a checkpoint is written from a copy in host memory")


class SaveFailed(OSError):
    """A checkpoint could not be written; the message says which and why."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors for want of space: of the disk, of a quota, or of what a file may have."""


def _reason(error: Exception) -> str:
    """Why something could not be written; TensorStore's errors name each file within the checkpoint on their way."""
    words = str(error)
    full = [os.strerror(number) for number in FULL if os.strerror(number) in words]
    return full[0] if full else words


class Saver:
    """Writes this rank's part of checkpoints, one checkpoint at a time."""

    def __init__(
        self,
        checkpoints: str | Path | Storage,
        config: CheckpointConfig | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
        barrier: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Args:
            checkpoints: a folder that all ranks see, or the URL of a key-value store.
            barrier: returns when every rank has called it.
        """
        self._checkpoints, self.config = storage_of(checkpoints), config or CheckpointConfig()
        self._rank, self._ranks, self._barrier = rank, ranks, barrier
        self._thread = ThreadPoolExecutor(1, "save")
        self._copying: Future[list[Chunk]] | None = None
        self._writing: Future[None] | None = None
        self._closed = Event()
        self._room: dict[tuple[str, int], Tensor] = {}

    def save(
        self,
        step: int,
        chunks: Iterable[Chunk],
        manifest: Mapping[str, Any],
        files: Mapping[str, str],
        *,
        wait: bool = True,
        best: bool = False,
    ) -> Storage:
        """Save one checkpoint; all ranks call this together. Waits for the previous save first.

        Args:
            chunks: those that this rank writes; with `wait` they may be made one by one.
            manifest: entries of the manifest besides the arrays.
            files: text files to keep beside the arrays, such as the tokenizer's.
            wait: return when the checkpoint is on disk; otherwise at once, and `chunks` must stay as they are until
                `copied` has returned.
            best: let the link `best` point to it.

        Raises:
            SaveFailed: for this save with `wait`, or for the one before it.
        """
        self.wait()
        name = step_name(step)
        if self._rank == 0:
            self._checkpoints.begin(name, STEP, MANIFEST)
        self._barrier()
        own = {"format": FORMAT, "step": step, "files": sorted(files)} | dict(manifest)
        self._copying = None if wait else self._thread.submit(self._copies, list(chunks))
        held = self._copying.result if self._copying else lambda: chunks
        self._writing = self._thread.submit(self._write, name, held, own, files, best)
        if wait:
            self.wait()
            self._barrier()
        return self._checkpoints / name

    def wait(self) -> None:
        """Wait until this rank's chunks are on disk; on rank 0, until the checkpoint is published.

        Raises:
            SaveFailed: when it has not been written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def copied(self) -> None:
        """Wait until the tensors of a background save may change, because they are copied to host memory.

        Copying goes on beside the next step's forward and backward pass: weights change after them.
        """
        if self._copying:
            self._copying.result()

    def close(self) -> None:
        """Wait for a save under way, then end the background thread."""
        try:
            self.wait()
        finally:
            self._closed.set()
            self._thread.shutdown()

    def _copies(self, chunks: list[Chunk]) -> list[Chunk]:
        return [self._copy(chunk) for chunk in chunks]

    def _copy(self, chunk: Chunk) -> Chunk:
        """Copy a chunk to host memory, which the next save reuses: fresh memory costs more than copying."""
        key, values = (chunk.name, chunk.number), chunk.values
        room = self._room.get(key)
        if room is None or room.shape != values.shape or room.dtype != values.dtype:
            room = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
            self._room[key] = room
        return replace(chunk, values=room.copy_(values))

    def _write(
        self,
        name: str,
        chunks: Callable[[], Iterable[Chunk]],
        manifest: dict[str, Any],
        files: Mapping[str, str],
        best: bool,
    ) -> None:
        draft = self._checkpoints.draft(name)
        try:
            written = write(draft / "arrays", chunks())
            (draft / "parts").write(f"{self._rank}.json", json.dumps(written))
            if self._rank == 0:
                tensors = merged(self._parts(draft / "parts"))
                for file, text in files.items():
                    draft.write(file, text)
                (draft / "parts").remove()
                draft.write(MANIFEST, json.dumps(manifest | {"tensors": tensors}, indent=1))
                self._checkpoints.publish(name)
                self._checkpoints.point("latest", name)
                if best:
                    self._checkpoints.point("best", name)
                self._thin_out()
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            with suppress(OSError, ValueError):
                (draft / "parts").write(FAILED, f"rank {self._rank}: {_reason(error)}")
            raise SaveFailed(f"{self._checkpoints / name} was not saved: {_reason(error)}") from error

    def _parts(self, parts: Storage) -> list[dict[str, Entry]]:
        """What all ranks wrote, as soon as they say it."""
        said: list[dict[str, Entry]] = []
        pause = POLL_S
        while len(said) < self._ranks:
            if parts.has(f"{len(said)}.json"):
                said.append(json.loads(parts.read(f"{len(said)}.json")))
                continue
            if parts.has(FAILED):
                raise OSError(parts.read(FAILED))
            if self._closed.wait(pause):
                raise OSError("the run ended before all ranks had written their part")
            pause = min(1.2 * pause, LONGEST_POLL_S)
        return said

    def _thin_out(self) -> None:
        """Remove the checkpoints that the configuration does not keep."""
        config = self.config
        if not config.keep_last:
            return
        steps, best = saved(self._checkpoints), self._checkpoints.pointed("best")
        for step in sorted(steps)[: -config.keep_last]:
            kept = config.keep_every and step % config.keep_every == 0
            if not kept and steps[step].name != best:
                steps[step].remove(MANIFEST)
