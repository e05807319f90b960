"""Checkpoints from one format to another: in parts that are small, in several processes, and on from where it stopped.

Every tensor passes through the slice map of `model/weights/names.py`, and none is changed but in dtype.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from lockstep.cluster.conversion import Conversion, TooMuchMemory, begun_with, target_of, tasks_of
from lockstep.cluster.memory import Watch, in_words
from lockstep.cluster.partial import BadTarget, Partial, check_destination, content_of, partial_folder
from lockstep.cluster.sources import open_source
from lockstep.cluster.workers import Workers, processes, this_process
from lockstep.distributed.checkpoint.manager import step_name
from lockstep.distributed.checkpoint.reshard import chunks_of
from lockstep.distributed.checkpoint.saver import Saver
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.checkpoint.tensors import Source, to_torch, whole
from lockstep.distributed.layout import Layout
from lockstep.model.config import ModelConfig, describe
from lockstep.model.formats.recast import Recast
from lockstep.model.formats.target import Part, Target
from lockstep.model.weights.names import logical_tensors

Progress = Callable[[int, int], object]
"""Is told the bytes that are done, and all of them."""


@dataclass
class Done:
    """What a conversion took."""

    folder: Path | Storage
    size: int
    peaks: dict[str, int] = field(default_factory=dict)
    """By process: bytes above what its interpreter and imports hold."""

    @property
    def peak(self) -> int:
        """Of all processes together."""
        return sum(self.peaks.values())


def convert(
    conversion: Conversion, progress: Progress = lambda done, total: None, workers: Workers = processes
) -> Done:
    """Do it, or go on with it.

    Args:
        workers: who writes; other processes see the same folders.

    Raises:
        BadSource: when the source is none.
        BadTarget: when the destination exists, is too small, or has a `DST.partial` of another conversion.
    """
    watch = Watch()
    check_destination(conversion.destination)
    target, _ = target_of(conversion, open_source(conversion.source), content_of(conversion.destination))
    if isinstance(conversion.destination, Path):
        _check_space(partial_folder(conversion.destination), target.parts)
    begun = Partial(conversion.destination, begun_with(conversion))
    try:
        target.create()
        return _finish(conversion, target, begun, watch, progress, workers)
    finally:
        begun.close()


def _finish(
    conversion: Conversion, target: Target, begun: Partial, watch: Watch, progress: Progress, workers: Workers
) -> Done:
    tasks = tasks_of(target.parts, conversion.part_bytes)
    done = Done(conversion.destination, sum(part.size for part in target.parts))
    left = [i for i in range(len(tasks)) if i not in begun.done]
    written = sum(part.size for i in begun.done for part in tasks[i])
    progress(written, done.size)
    for worked in workers(conversion, content_of(conversion.destination), left):
        begun.record(worked.task, worked.digests)
        begun.done[worked.task] = worked.digests
        done.peaks[worked.process] = worked.peak
        written += sum(part.size for part in tasks[worked.task])
        progress(written, done.size)
        if written < done.size:
            _check_memory(done, conversion)
    pairs = (zip(tasks[i], digests, strict=True) for i, digests in begun.done.items())
    target.finish({part: said for pair in pairs for part, said in pair})
    begun.commit()
    done.peaks[this_process()] = watch.peak()
    return done


def _check_memory(done: Done, conversion: Conversion) -> None:
    if done.peak > conversion.max_memory:
        raise TooMuchMemory(
            f"the conversion needed {in_words(done.peak)}, and --max-memory allows {in_words(conversion.max_memory)}: "
            "give more, or fewer workers, and remove what is partial"
        )


def _check_space(folder: Path, parts: Sequence[Part]) -> None:
    needed = sum(part.size for part in parts)
    taken = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(nearest).free
    if needed > free + taken:
        said = f"{folder} needs {in_words(needed)}, and its disk has {in_words(free)} left"
        raise BadTarget(f"{said}: make room, or choose another disk")


def tensors(source: Source, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every logical tensor, whole, one at a time."""
    for name, shape in logical_tensors(model).items():
        yield name, to_torch(np.ascontiguousarray(source.read(name, whole(shape))))


def write_checkpoint(source: Source, model: ModelConfig, files: dict[str, str], destination: Path) -> Path:
    """A model as our sharded checkpoint `destination/step-000000`."""
    destination.mkdir(parents=True, exist_ok=True)
    chunks = (chunk for name, tensor in tensors(source, model) for chunk in chunks_of(tensor, name))
    Saver(destination).save(0, chunks, describe(model, Layout()), files)
    return destination / step_name(0)


def to_lockstep(name: str, destination: Path, *, dtype: str | None = None) -> Path:
    """A model as our sharded checkpoint `destination/step-000000`."""
    source, model, files = open_source(name)
    return write_checkpoint(Recast(source, model, dtype, states=False), model, files, destination)


def to_huggingface(name: str, destination: Path, *, dtype: str | None = None) -> Path:
    """A model as a folder that `from_pretrained` reads.

    Raises:
        BadTarget: when the destination exists.
    """
    convert(Conversion(name, destination, "hf", dtype))
    return destination
