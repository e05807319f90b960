"""Saving and loading 1 GiB of weights and optimizer state: Lockstep, torch's DCP and safetensors beside the disk.

    python benchmarks/checkpoint.py [--gib 1] [--rounds 3] [--folder .]

Two processes with ZeRO-1 save a model in bf16 with fp32 masters and AdamW's moments, and two tensor-parallel processes
load it: another layout, so that every rank reads slices. DCP saves and loads the same bytes from the same processes,
each its own, and safetensors from one. Every save counts until all is on disk (fsync), every load with no byte of it in
the page cache. The disk's own rate is that of one file, written in pieces of 16 MiB and synced, and read back likewise.
A save in the background stalls the trainer for as long as the call takes, and for as long as the next update waits for
the copy in host memory; a real step of 2 × 512 tokens goes on meanwhile. What the step itself loses to copying and
writing on the same cores is given as well.

Rounds alternate; medians count. Free memory is touched before every measurement: where the host takes back what a
virtual machine does not use, the page cache would else pay for getting it again, in some measurements and not in
others. Processes have the environment that a run's have.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file

from lockstep.data.batch import sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.saver import Saver
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, describe
from lockstep.model.loading import build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import load
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.remote import ENVIRONMENT

BYTES = 14
"""Of a parameter: bf16, and three times fp32."""
ROUNDS = 3
TOUCHED = 3 << 30
"""Bytes of free memory that are there when a measurement begins."""
TOKENS = 512
"""Of a row of the step beside which a save goes on."""
SAVING, LOADING = Layout(data=2, zero=1), Layout(tensor=2)


def model_of(gib: float) -> ModelConfig:
    """A Llama whose checkpoint has about so many GiB: half of it in blocks, half in the embedding and the head."""
    width, layers = 1024, max(1, round(gib * 5))
    model = ModelConfig(
        layers=layers, width=width, heads=16, kv_heads=8, head_dim=64, intermediate=2816, vocabulary=256, context=512
    )
    rest = gib * 2**30 / BYTES - model.parameters
    return model.model_copy(update={"vocabulary": 256 + max(0, int(rest / width / 2))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to measure")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    model = model_of(args.gib)
    size = model.parameters * BYTES
    print(f"{size / 2**30:.2f} GiB: {model.parameters / 1e6:.1f}M parameters", flush=True)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmark-") as name, RankPool(900) as worlds:
        for number in range(args.rounds):
            folder = Path(name) / str(number)
            folder.mkdir()
            rounds.append(one_round(worlds, model, folder, size))
            shutil.rmtree(folder)
            print(json.dumps({k: round(v, 3) for k, v in rounds[-1].items()}), flush=True)
    report({key: statistics.median(r[key] for r in rounds) for key in rounds[0]}, size)


def one_round(worlds: RankPool, model: ModelConfig, folder: Path, size: int) -> dict[str, float]:
    """Seconds of everything, once."""
    seconds = raw(folder / "raw", size)
    seconds |= slowest(worlds.run(SAVING, saving, model, folder))
    seconds |= slowest(worlds.run(LOADING, loading, model, folder))
    seconds |= one_file(folder / "all.safetensors", size)
    return seconds


def slowest(ranks: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}


def timed(function: Callable[[], object]) -> float:
    if not dist.is_initialized():
        touch()
    else:
        if dist.get_rank() == 0:
            touch()
        dist.barrier()
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def touch() -> None:
    """Have the host give memory, and leave it to the kernel."""
    with mmap.mmap(-1, TOUCHED) as free:
        np.frombuffer(free, np.uint8)[:: mmap.PAGESIZE] = 1


def forget(path: Path) -> None:
    """Drop files from the page cache."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw(path: Path, size: int) -> dict[str, float]:
    """One file, in pieces of 16 MiB."""
    block = np.random.default_rng(0).bytes(16 << 20)

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(size // len(block)):
                file.write(block)
            os.fsync(file.fileno())

    def read() -> None:
        room = bytearray(16 << 20)
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass

    seconds = {"disk write": timed(write)}
    forget(path)
    seconds["disk read"] = timed(read)
    path.unlink()
    return seconds


def trainer_of(groups: Groups, model: ModelConfig, source: Any) -> Trainer:
    return Trainer(build(model, groups, torch.bfloat16, source), groups, OptimizerConfig())


def saving(groups: Groups, model: ModelConfig, folder: Path) -> dict[str, float]:
    """Ours, at once and in the background, and DCP's."""
    trainer = trainer_of(groups, model, RandomWeights(model, 0))
    for held in trainer.engine._zero._shares:  # as after a step
        state = trainer.engine._zero._innermost().state[held]
        state.update(step=torch.tensor(1.0), exp_avg=torch.randn_like(held), exp_avg_sq=torch.rand_like(held))
    saver = Saver(folder / "ours", rank=groups.rank, ranks=groups.layout.processes, barrier=dist.barrier)
    said = describe(model, groups.layout) | {"updates": 1}
    seconds = {"save": timed(lambda: saver.save(1, trainer.chunks(state=True), said, {}))}
    seconds |= in_background(trainer, saver, said, groups)
    own = {f"{c.name}@{c.number}": c.values.clone() for c in trainer.chunks(state=True)}
    seconds["DCP save"] = timed(lambda: dcp.save(own, checkpoint_id=folder / "dcp"))
    dist.barrier()
    for name in ("ours", "dcp"):
        forget(folder / name)
    seconds["DCP load"] = timed(lambda: dcp.load(own, checkpoint_id=folder / "dcp"))
    return seconds


def in_background(trainer: Trainer, saver: Saver, said: dict[str, Any], groups: Groups) -> dict[str, float]:
    """What the trainer waits for, and how long a step takes beside a save and alone."""
    tokens = np.random.default_rng(groups.rank).integers(0, 256, (2, TOKENS + 1)).tolist()
    rows = rows_for_ranks([sample(t[:1], t[1:]) for t in tokens], row_rules(Layout(), TOKENS))[0]
    waited: list[float] = []

    def wait() -> None:
        began = time.perf_counter()
        saver.copied()
        waited.append(time.perf_counter() - began)

    trainer.engine.before_changes = wait
    seconds: dict[str, float] = {}
    for step in (2, 3):  # the first background save makes room for its copies
        trainer.step(rows, nll, 0.0)
        alone = timed(lambda: trainer.step(rows, nll, 0.0))
        call = timed(lambda step=step: saver.save(step, trainer.chunks(state=True), said, {}, wait=False))
        beside = timed(lambda: trainer.step(rows, nll, 0.0))
        seconds = {"stall": call + waited[-1], "step alone": alone, "step beside a save": beside}
        saver.wait()
    return seconds


def loading(groups: Groups, model: ModelConfig, folder: Path) -> dict[str, float]:
    """Weights and state into a layout that cuts every matrix elsewhere."""
    trainer = trainer_of(groups, model, RandomWeights(model, 1))
    forget(folder / "ours")

    def read() -> None:
        checkpoint = Checkpoint(folder / "ours" / "step-000003")
        load(trainer.transformer, checkpoint)
        trainer.restore(checkpoint)

    return {"load": timed(read)}


def one_file(path: Path, size: int) -> dict[str, float]:
    """safetensors, from one process."""
    tensors = {str(i): torch.randn(1 << 24) for i in range(max(1, size >> 26))}

    def write() -> None:
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def read() -> None:
        with safe_open(path, "pt") as file:
            for name in tensors:
                tensors[name].copy_(file.get_tensor(name))

    seconds = {"safetensors save": timed(write)}
    forget(path)
    return seconds | {"safetensors load": timed(read)}


def report(seconds: dict[str, float], size: int) -> None:
    """Rates, and the three ratios that count."""
    for key, value in seconds.items():
        rate = "" if key.startswith("st") else f"{size / value / 1e9:6.2f} GB/s"
        print(f"{key:18} {value:7.3f} s  {rate}")
    print(f"save / disk write: {seconds['disk write'] / seconds['save']:.2f}")
    print(f"load into another layout / disk read: {seconds['disk read'] / seconds['load']:.2f}")
    print(f"stall in the background / save: {seconds['stall'] / seconds['save']:.3f}")


if __name__ == "__main__":
    main()
