"""Our own checkpoints: read as language models, and written as the target of a conversion or whole."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import arrays, manager
from lockstep.distributed.checkpoint.manager import step_name
from lockstep.distributed.checkpoint.reshard import chunks_of
from lockstep.distributed.checkpoint.saver import Saver
from lockstep.distributed.checkpoint.storage import Storage, storage_of
from lockstep.distributed.checkpoint.tensors import Source, to_torch, whole
from lockstep.distributed.layout import Layout
from lockstep.model.config import ModelConfig, UnknownModel, describe
from lockstep.model.formats.target import Part, Wanted, rows_of_part, split
from lockstep.model.weights.lora import merged
from lockstep.model.weights.names import logical_tensors


def read_language_model(checkpoint: Path | Storage) -> tuple[ModelConfig, Source, Tokenizer]:
    """The configuration, the weights with adapters merged into them, and the tokenizer of a checkpoint of ours.

    Raises:
        UnknownModel: when it writes no text.
    """
    source = manager.Checkpoint(checkpoint)
    model = ModelConfig(**source.manifest["model"])
    check_language_model(model, checkpoint)
    return *merged(model, source), Tokenizer(source.files)


def check_language_model(model: ModelConfig, name: object) -> None:
    """Raise unless a model writes text.

    Raises:
        UnknownModel: names the checkpoint.
    """
    if model.head == "value":
        raise UnknownModel(f"{name} has a value head and writes no text: give a language model's checkpoint")


def tensors(source: Source, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Read every logical tensor, whole, one at a time."""
    for name, shape in logical_tensors(model).items():
        yield name, to_torch(np.ascontiguousarray(source.read(name, whole(shape))))


def write_checkpoint(source: Source, model: ModelConfig, files: dict[str, str], destination: Path) -> Path:
    """Write a model as our sharded checkpoint `destination/step-000000`; returns its folder."""
    destination.mkdir(parents=True, exist_ok=True)
    chunks = (chunk for name, tensor in tensors(source, model) for chunk in chunks_of(tensor, name))
    Saver(destination).save(0, chunks, describe(model, Layout()), files)
    return destination / step_name(0)


class LockstepTarget:
    """Our own format as a `Target`: each chunk of an array is a part."""

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
