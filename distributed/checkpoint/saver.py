"""Saving from all ranks at once: each writes its chunks into `step-000120.partial` and then says what it wrote.

When all have, rank 0 writes the manifest, sees to it that all is on disk, and gives the folder its name. Nothing
travels between ranks meanwhile, so that they may train on.
"""

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lockstep.distributed.checkpoint.manager import FORMAT, link, remove, saved, step_name, sync
from lockstep.distributed.checkpoint.store import Chunk, Entry, merged, write

POLL_S = 0.02


class CheckpointConfig(BaseModel):
    """When checkpoints are saved, and which of them stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(0, ge=0, description="steps between checkpoints; 0 saves one at the end")
    keep_last: int = Field(0, ge=0, description="how many of the newest stay; 0 for all")
    keep_every: int = Field(0, ge=0, description="checkpoints of multiples of so many steps stay as well; 0 for none")
    asynchronous: bool = Field(True, description="train on while a checkpoint is written from a copy in host memory")


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the sentence says which and why."""


class Saver:
    """One rank's part in saving a world's checkpoints, of which one at a time is written."""

    def __init__(
        self,
        checkpoints: Path,
        config: CheckpointConfig | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
        barrier: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Args:
            barrier: returns when every rank has called it.
        """
        self._checkpoints, self.config = checkpoints, config or CheckpointConfig()
        self._rank, self._ranks, self._barrier = rank, ranks, barrier
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future[None] | None = None
        self._closed = Event()
        self._copies: dict[tuple[str, int], Tensor] = {}

    def save(
        self,
        step: int,
        chunks: Iterable[Chunk],
        manifest: Mapping[str, Any],
        files: Mapping[str, str],
        *,
        wait: bool = True,
        best: bool = False,
    ) -> Path:
        """Save one checkpoint; all ranks call this together. A save before it is waited for.

        Args:
            chunks: those that this rank writes; with `wait` they may be made one by one.
            manifest: what the checkpoint says of itself, beside what its arrays are.
            files: text files to keep beside the arrays, such as the tokenizer's.
            wait: return when the checkpoint is on disk; otherwise when `chunks` were copied to host memory.
            best: let the link `best` point to it.

        Raises:
            SaveFailed: for this save with `wait`, or for the one before it.
        """
        self.wait()
        final = self._checkpoints / step_name(step)
        partial = final.with_name(f"{final.name}.partial")
        if self._rank == 0:
            for interrupted in self._checkpoints.glob("step-*.partial"):
                shutil.rmtree(interrupted, ignore_errors=True)
            for folder in ("arrays", "parts"):
                (partial / folder).mkdir(parents=True)
        self._barrier()
        held = chunks if wait else [self._copied(chunk) for chunk in chunks]
        own = {"format": FORMAT, "step": step, "files": sorted(files)} | dict(manifest)
        self._writing = self._thread.submit(self._write, partial, final, held, own, files, best)
        if wait:
            self.wait()
            self._barrier()
        return final

    def wait(self) -> None:
        """Return when what this rank writes is on disk; on rank 0, when the checkpoint has its name.

        Raises:
            SaveFailed: when it has not been written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """Wait for a save, and save no more."""
        try:
            self.wait()
        finally:
            self._closed.set()
            self._thread.shutdown()

    def _copied(self, chunk: Chunk) -> Chunk:
        """The chunk in host memory that the next save will use again: fresh memory costs more than copying."""
        key, values = (chunk.name, chunk.number), chunk.values
        room = self._copies.get(key)
        if room is None or room.shape != values.shape or room.dtype != values.dtype:
            room = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
            self._copies[key] = room
        return replace(chunk, values=room.copy_(values))

    def _write(
        self,
        partial: Path,
        final: Path,
        chunks: Iterable[Chunk],
        manifest: dict[str, Any],
        files: Mapping[str, str],
        best: bool,
    ) -> None:
        said = partial / "parts" / f"{self._rank:05d}.json"
        try:
            _put(said, json.dumps(write(partial / "arrays", chunks)))
            if self._rank == 0:
                tensors = merged(self._parts(partial))
                for name, text in files.items():
                    _put(partial / name, text)
                _put(partial / "manifest.json", json.dumps(manifest | {"tensors": tensors}, indent=1))
                shutil.rmtree(partial / "parts")
                _commit(partial, final)
                link(final, "latest")
                if best:
                    link(final, "best")
                self._thin_out()
        except (OSError, ValueError) as error:
            with suppress(OSError):
                _put(said.with_suffix(".failed"), str(error))
            raise SaveFailed(f"{final} was not saved: {error}") from error

    def _parts(self, partial: Path) -> list[dict[str, Entry]]:
        """What all ranks wrote, as soon as they say it."""
        folder = partial / "parts"
        while True:
            for failed in folder.glob("*.failed"):
                raise OSError(f"rank {int(failed.stem)}: {failed.read_text()}")
            said = sorted(folder.glob("*.json"))
            if len(said) == self._ranks:
                return [json.loads(path.read_text()) for path in said]
            if self._closed.wait(POLL_S):
                raise OSError("the run ended before all ranks had written their part")

    def _thin_out(self) -> None:
        """Remove the checkpoints that the configuration does not keep."""
        steps, config = saved(self._checkpoints), self.config
        if not config.keep_last:
            return
        best = (self._checkpoints / "best").resolve()
        for step in sorted(steps)[: -config.keep_last]:
            kept = config.keep_every and step % config.keep_every == 0
            if not kept and steps[step].resolve() != best:
                remove(steps[step])


def _put(path: Path, text: str) -> None:
    """Write a text file that appears whole, and is on disk then."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


def _commit(partial: Path, final: Path) -> None:
    """Give a checkpoint its name. Arrays and files are on disk already, the folders that list them may not be."""
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        sync(folder)
    if final.exists():
        _exchange(partial, final)
        shutil.rmtree(partial)
    else:
        partial.rename(final)
    sync(final.parent)


def _exchange(a: Path, b: Path) -> None:
    """Let two folders change names, at once: renameat2(2) with RENAME_EXCHANGE."""
    here, exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange):
        raise OSError(ctypes.get_errno(), f"{b} exists and cannot be replaced: {os.strerror(ctypes.get_errno())}")
