"""Converts checkpoints between formats: in small parts, by several processes, resumable after a kill.

Every tensor passes through the slice map of `model/weights/names.py`, and none is changed but in dtype.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.cluster.conversion.inspection import check_has_weights
from lockstep.cluster.conversion.local_workers import Workers, processes, this_process
from lockstep.cluster.conversion.memory import Watch, in_words
from lockstep.cluster.conversion.plan import Conversion, TooMuchMemory, begun_with, target_of, tasks_of
from lockstep.cluster.conversion.staging import BadTarget, Staging, check_destination, content_of, partial_folder
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.model.formats.registry import OpenModel, open_model
from lockstep.model.formats.target import Part, Target

Progress = Callable[[int, int], object]
"""Is told the bytes that are done, and all of them."""


@dataclass
class Done:
    """The result of a conversion: where it is, its size, and the peak memory of each process."""

    folder: Path | Storage
    size: int
    peaks: dict[str, int] = field(default_factory=dict)
    """By process: bytes above what its interpreter and imports hold."""

    @property
    def peak(self) -> int:
        """Peak memory of all processes together, in bytes."""
        return sum(self.peaks.values())


def convert_checkpoint(
    conversion: Conversion,
    progress: Progress = lambda done, total: None,
    workers: Workers = processes,
    opened: OpenModel | None = None,
) -> Done:
    """Convert a checkpoint, or go on where an earlier process stopped.

    Args:
        workers: who writes; other processes see the same folders.
        opened: the model that `conversion.source` names, where the caller has opened it already.

    Raises:
        BadSource: when the source is none.
        BadTarget: when the destination exists, is too small, or has a `DST.partial` of another conversion.
    """
    watch = Watch()
    check_destination(conversion.destination)
    opened = opened or open_model(conversion.source)
    check_has_weights(opened)
    target, _ = target_of(conversion, opened, content_of(conversion.destination))
    if isinstance(conversion.destination, Path):
        _check_space(partial_folder(conversion.destination), target.parts)
    begun = Staging(conversion.destination, begun_with(conversion, opened))
    try:
        target.create()
        return _finish(conversion, opened, target, begun, watch, progress, workers)
    finally:
        begun.close()


def _finish(
    conversion: Conversion,
    opened: OpenModel,
    target: Target,
    begun: Staging,
    watch: Watch,
    progress: Progress,
    workers: Workers,
) -> Done:
    tasks = tasks_of(target.parts, conversion.part_bytes)
    done = Done(conversion.destination, sum(part.size for part in target.parts))
    left = [i for i in range(len(tasks)) if i not in begun.done]
    written = sum(part.size for i in begun.done for part in tasks[i])
    progress(written, done.size)
    for worked in workers(conversion, opened, content_of(conversion.destination), left):
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
            f"the conversion needed {in_words(done.peak)}, more than max_memory={in_words(conversion.max_memory)}: "
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


def to_huggingface(name: str, destination: Path, *, dtype: str | None = None) -> Path:
    """Convert a model to a folder that `from_pretrained` reads.

    Raises:
        BadTarget: when the destination exists.
    """
    convert_checkpoint(Conversion(name, destination, "hf", dtype))
    return destination
