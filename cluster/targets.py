"""What a model can be converted to: each format says whether it holds an optimizer's state, and how it is written."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lockstep.distributed.checkpoint import arrays, manager
from lockstep.distributed.checkpoint.storage import Storage, storage_of
from lockstep.distributed.checkpoint.tensors import to_torch, whole
from lockstep.distributed.layout import Layout
from lockstep.model.config import ModelConfig, describe
from lockstep.model.formats.deepspeed.writer import UniversalTarget
from lockstep.model.formats.huggingface.writer import HuggingFaceTarget
from lockstep.model.formats.peft import PeftTarget
from lockstep.model.formats.recast import Recast
from lockstep.model.formats.target import Part, Target, rows_of_part, split


@dataclass(frozen=True)
class Wanted:
    """What a target is made of, and how."""

    model: ModelConfig
    source: Recast
    files: Mapping[str, str]
    shard_bytes: int
    part_bytes: int
    origin: str = ""
    """Where the model comes from."""


@dataclass(frozen=True)
class TargetFormat:
    """A format that can be written."""

    title: str
    has_states: bool
    target: Callable[[Any, Wanted], Target]
    """Written into a folder."""
    to_stores: bool = False
    """Whether a key-value store will do in the place of a folder."""
    adapters: Literal["kept", "merged", "alone"] = "merged"
    """Whether a model's adapters stay beside its weights, go into them, or are all that is written."""
    has_values: bool = False
    """Whether it holds value heads."""


class LockstepTarget:
    """Our own format, as a `Target`: a chunk of an array is a part."""

    def __init__(self, folder: Path | Storage, wanted: Wanted) -> None:
        self._checkpoints, self._wanted = storage_of(folder), wanted
        self._place = self._checkpoints / manager.step_name(0)
        self._tensors = wanted.source.tensors
        limit = wanted.part_bytes
        self._rows = {n: rows_of_part(shape, d.itemsize, limit) for n, (shape, d) in self._tensors.items()}
        self.parts: Sequence[Part] = [
            p for n, (shape, d) in self._tensors.items() for p in split(n, shape, d.itemsize, limit)
        ]

    def create(self) -> None:
        """See `Target`. Arrays are created with their first parts."""

    def write(self, part: Part) -> str:
        """See `Target`."""
        shape, _ = self._tensors[part.tensor]
        box = ((part.start, part.stop), *whole(shape[1:]))
        array = self._wanted.source.read(part.tensor, box)
        chunk = arrays.Chunk(part.tensor, shape, self._chunk(part.tensor), box, to_torch(array))
        written = arrays.write(self._place / "arrays", [chunk])
        return written[part.tensor]["digests"][chunk.number]

    def finish(self, digests: Mapping[Part, str]) -> None:
        """See `Target`."""
        for name, text in self._wanted.files.items():
            self._place.write(name, text)
        own = {"format": manager.FORMAT, "step": 0, "files": sorted(self._wanted.files)}
        said = {"updates": self._wanted.source.updates, "tensors": self._table(digests)}
        manifest = own | describe(self._wanted.model, Layout()) | said
        self._place.write(manager.MANIFEST, json.dumps(manifest, indent=1))
        self._checkpoints.point("latest", self._place.name)

    def _table(self, digests: Mapping[Part, str]) -> dict[str, Any]:
        table: dict[str, Any] = {
            name: {"shape": shape, "dtype": dtype.name, "chunk": self._chunk(name), "digests": []}
            for name, (shape, dtype) in self._tensors.items()
        }
        for part in self.parts:
            table[part.tensor]["digests"].append(digests[part])
        return table

    def _chunk(self, name: str) -> tuple[int, ...]:
        return (self._rows[name], *self._tensors[name][0][1:])


def _megatron(folder: Path, wanted: Wanted) -> Target:
    from lockstep.model.formats.megatron.writer import MegatronTarget  # loads torch's checkpoints, which takes a second

    return MegatronTarget(folder, wanted.model, wanted.source, wanted.files, limit=wanted.part_bytes)


def _deepspeed(folder: Path, wanted: Wanted) -> Target:
    return UniversalTarget(folder, wanted.model, wanted.source, wanted.files, limit=wanted.part_bytes)


def _huggingface(folder: Path, wanted: Wanted) -> Target:
    return HuggingFaceTarget(
        folder,
        wanted.model,
        wanted.source,
        wanted.files,
        shard_bytes=wanted.shard_bytes,
        limit=wanted.part_bytes,
    )


def _peft(folder: Path, wanted: Wanted) -> Target:
    return PeftTarget(folder, wanted.model, wanted.source, wanted.origin, limit=wanted.part_bytes)


TARGETS: dict[str, TargetFormat] = {
    "lockstep": TargetFormat("Lockstep", True, LockstepTarget, to_stores=True, adapters="kept", has_values=True),
    "hf": TargetFormat("Hugging Face", False, _huggingface, has_values=True),
    "peft": TargetFormat("PEFT", False, _peft, adapters="alone", has_values=True),
    "megatron": TargetFormat("Megatron torch_dist", True, _megatron),
    "deepspeed": TargetFormat("DeepSpeed universal", True, _deepspeed),
}
"""By the name that `--to` takes."""
