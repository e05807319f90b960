"""A save that is killed at any moment leaves the checkpoint before it or its own: never none, never a mixture."""

import multiprocessing
import time
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.arrays import Chunk
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.saver import CheckpointConfig, Saver
from lockstep.distributed.checkpoint.storage import Folder, Storage, storage_of
from lockstep.distributed.checkpoint.tensors import digest, whole

SHAPE, ROWS, ARRAYS, RANKS = (64, 256), 16, 12, 2


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "lockstep.distributed.checkpoint.saver"])
    return context


def chunks(step: int, rank: int) -> list[Chunk]:
    """Every second chunk of arrays that are full of the number of the step."""
    found = []
    for number in range(ARRAYS):
        for start in range(rank * ROWS, SHAPE[0], RANKS * ROWS):
            box = ((start, start + ROWS), (0, SHAPE[1]))
            found.append(Chunk(f"w{number}", SHAPE, (ROWS, SHAPE[1]), box, torch.full((ROWS, SHAPE[1]), float(step))))
    return found


def save_on_and_on(folder: Storage, first: int, rank: int, barrier: Any, ready: Any, saved: Any) -> None:
    torch.set_num_threads(1)
    ready.set()
    saver = Saver(folder, CheckpointConfig(keep_last=2), rank=rank, ranks=RANKS, barrier=barrier.wait)
    before = 0
    for number in range(first, first + 1_000_000):
        step = number - (number % 3 == 0)  # every third time, a step that is there already
        saver.save(step, chunks(step, rank), {}, {"note": "."}, wait=number % 2 == 0)
        if before > first:  # all saves before this one have ended; in a store, one made again may be lost to the kill
            saved.set()
        before = step


def check(folder: Storage) -> int:
    """Every checkpoint that has its name is whole; returns the newest step."""
    steps = manager.saved(folder)
    if isinstance(folder, Folder):
        named = {path.name for path in folder.path.glob("step-*") if not path.name.endswith(".partial")}
        assert {place.name for place in steps.values()} == named
    for step, path in steps.items():
        checkpoint = Checkpoint(path)
        assert checkpoint.manifest["step"] == step
        assert checkpoint.files == {"note": "."}
        assert len(checkpoint.tensors) == ARRAYS
        for name, entry in checkpoint.tensors.items():
            values = checkpoint.read(name, whole(SHAPE))
            assert (values == step).all(), f"{name} of step {step} is of another"
            assert [digest(part) for part in np.split(values, SHAPE[0] // ROWS)] == entry["digests"]
    if steps and isinstance(folder, Folder):
        assert folder.pointed("latest") in {place.name for place in steps.values()}
    return max(steps, default=0)


def kill_at_random(kills: int, context: BaseContext, folder: Storage) -> None:
    draw, newest = np.random.default_rng(0), 0
    for _ in range(kills):
        barrier, ready, saved = context.Barrier(RANKS), context.Event(), context.Event()
        arguments = [(folder, newest + 1, rank, barrier, ready, saved) for rank in range(RANKS)]
        ranks = [context.Process(target=save_on_and_on, args=each) for each in arguments]
        for process in ranks:
            process.start()
        saves = draw.random() < 0.7
        (saved if saves else ready).wait()
        time.sleep(draw.uniform(0, 0.5))
        for place in draw.permutation(RANKS):
            ranks[place].kill()
            time.sleep(draw.uniform(0, 0.02))
        for process in ranks:
            process.join()
        found = check(folder)
        assert found >= newest - 1, f"step {newest} was there, and {found} is the newest now"
        assert found > newest or not saves, f"a step after {newest} had been saved before the kill, and is gone"
        newest = max(found, newest)


def test_ten_kills(processes: BaseContext, tmp_path: Path) -> None:
    kill_at_random(10, processes, Folder(tmp_path))


def test_ten_kills_beside_a_key_value_store(processes: BaseContext, tmp_path: Path) -> None:
    kill_at_random(10, processes, storage_of(f"file://{tmp_path}/"))


@pytest.mark.exhaustive
def test_two_hundred_kills(processes: BaseContext, tmp_path: Path) -> None:
    kill_at_random(200, processes, Folder(tmp_path))
