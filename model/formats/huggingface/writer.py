"""Writes Hugging Face folders in parts: headers of all shards first, from shapes alone, then tensors in any order."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.tensors import Source, digest
from lockstep.model.config import ModelConfig
from lockstep.model.formats.files.extents import write_bytes
from lockstep.model.formats.files.safetensors import Shapes, layout
from lockstep.model.formats.huggingface.families.registry import to_huggingface
from lockstep.model.formats.huggingface.reader import CONFIG
from lockstep.model.formats.huggingface.tensor_names import STORED, Stored
from lockstep.model.formats.recast import Recast
from lockstep.model.formats.target import GENERATION, LARGEST_PART, Part, split, write_whole
from lockstep.model.weights.names import EMBEDDING, logical_tensors

SHARD_BYTES = 5 * 10**9
"""Largest file of weights, unless told otherwise: what the hub advises."""

_FILE = "model.safetensors"


class HuggingFaceTarget:
    """A folder that `from_pretrained` reads, as a `Target`. It holds weights alone."""

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        source: Recast,
        files: Mapping[str, str],
        *,
        shard_bytes: int = SHARD_BYTES,
        limit: int = LARGEST_PART,
    ) -> None:
        """
        Args:
            files: name and text of what stands beside the weights, such as the tokenizer's files.
            shard_bytes: of a file of weights at most, if no single tensor is larger.
            limit: bytes of a part at most.

        Raises:
            UnknownModel: when the family has no words for some feature of this model.
        """
        self._folder, self._source, self._files = folder, source, files
        self._words = to_huggingface(model, source.dtype_of(EMBEDDING).name)
        self._grouped = _stored(model)
        self._shards = _shards(self._shapes(model), shard_bytes)
        laid = {file: layout(folder / file, tensors) for file, tensors in self._shards.items()}
        self._headers = {file: header for file, (header, _) in laid.items()}
        self._extents = {name: extent for _, extents in laid.values() for name, extent in extents.items()}
        self.parts: Sequence[Part] = [
            part for name, e in self._extents.items() for part in split(name, e.shape, e.dtype.itemsize, limit)
        ]

    def create(self) -> None:
        """See `Target`. The disk space of every file is allocated."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for file, header in self._headers.items():
            size = sum(self._extents[name].size for name in self._shards[file])
            with open(self._folder / file, "ab") as opened:
                os.posix_fallocate(opened.fileno(), 0, len(header) + size)
            write_bytes(self._folder / file, 0, np.frombuffer(header, np.uint8))

    def write(self, part: Part) -> str:
        """See `Target`."""
        rows = self._rows(part)
        self._extents[part.tensor].write(part.start, rows)
        return digest(rows)

    def finish(self, digests: Mapping[Part, str]) -> None:
        """See `Target`."""
        if len(self._shards) > 1:
            total = sum(extent.size for extent in self._extents.values())
            places = {name: file for file, tensors in self._shards.items() for name in tensors}
            self._text(f"{_FILE}.index.json", _dump({"metadata": {"total_size": total}, "weight_map": places}))
        self._text(CONFIG, _dump(self._words))
        self._text(GENERATION, _dump({key: self._words[key] for key in ("bos_token_id", "eos_token_id")}))
        for name, text in self._files.items():
            self._text(name, text)

    def _shapes(self, model: ModelConfig) -> Shapes:
        logical = logical_tensors(model)
        return {
            name: (places[0][1].shape(logical[places[0][0]]), self._source.dtype_of(places[0][0]))
            for name, places in self._grouped.items()
        }

    def _rows(self, part: Part) -> NDArray[Any]:
        """Rows of a stored tensor, from the one logical tensor or the several that lie side by side in it."""
        shape = self._extents[part.tensor].shape
        if len(shape) == 1:
            each = shape[0] // len(self._grouped[part.tensor])
            vectors = [self._source.read(name, ((0, each),)) for name, _ in self._grouped[part.tensor]]
            return np.concatenate(vectors)[part.start : part.stop]
        arrays = []
        for name, place in self._grouped[part.tensor]:
            box = ((part.start, part.stop), (0, shape[1] // place.parts))
            read = self._source.read(name, box[::-1] if place.transposed else box)
            arrays.append(read.T if place.transposed else read)
        return np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1))

    def _text(self, name: str, text: str) -> None:
        (self._folder / name).write_text(text)


def write(folder: Path, model: ModelConfig, source: Source, files: Mapping[str, str]) -> None:
    """Write a folder that `from_pretrained` reads, in the source's own dtype."""
    write_whole(HuggingFaceTarget(folder, model, Recast(source, model, None), files))


def _stored(model: ModelConfig) -> dict[str, list[tuple[str, Stored]]]:
    """By stored name: the logical tensors that lie in it, in their order there."""
    in_file, grouped = STORED.get(model.family, Stored), dict[str, list[tuple[str, Stored]]]()
    for name in logical_tensors(model):
        place = in_file(name)
        grouped.setdefault(place.name, []).append((name, place))
    return {stored: sorted(places, key=lambda place: place[1].part) for stored, places in grouped.items()}


def _shards(tensors: Shapes, limit: int) -> dict[str, Shapes]:
    """The tensors of each file, in order; a file is closed before the tensor that would make it too large."""
    files: list[dict[str, tuple[tuple[int, ...], np.dtype[Any]]]] = []
    filled = limit + 1
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if filled + size > limit:
            files.append({})
            filled = 0
        files[-1][name] = (shape, dtype)
        filled += size
    if len(files) == 1:
        return {_FILE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, start=1)}


def _dump(words: Mapping[str, Any]) -> str:
    return json.dumps(words, indent=2)
