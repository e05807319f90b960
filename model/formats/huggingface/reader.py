"""Reads Hugging Face folders: safetensors or .bin files, sharded or not, `config.json` and tokenizer files.

Files name their tensors as `model/weights/names.py` does, except GPT-2's and Mixtral's. In GPT-2's, q, k and v are one
tensor, linear layers are stored as [inputs, outputs], and blocks are called `transformer.h` (or `h`, in files of the
bare model); Mixtral's have words of their own for experts.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.file_names import path_inside
from lockstep.distributed.checkpoint.tensors import Box, WeightsOnly
from lockstep.model.config import ModelConfig
from lockstep.model.formats.files.extents import Extent, checked_tensor
from lockstep.model.formats.files.reading import read_object, read_text
from lockstep.model.formats.files.safetensors import read_header
from lockstep.model.formats.files.torch_pickle import read_torch
from lockstep.model.formats.huggingface.families.registry import from_huggingface
from lockstep.model.formats.huggingface.tensor_names import STORED, Stored
from lockstep.model.formats.target import GENERATION, TEXT_FILES
from lockstep.model.weights.names import EMBEDDING, HEAD, logical_tensors

CONFIG = "config.json"

_WEIGHTS = {"model.safetensors": read_header, "pytorch_model.bin": read_torch}


_BUFFERS = re.compile(r".*(\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|(^|\.)h\.\d+\.attn\.(masked_)?bias)")
"""Tensors that older versions of `transformers` stored and that follow from config.json: frequencies, causal masks."""

_BLOCK = 8 << 20
"""Bytes of two tensors that are compared at once."""


class BadFolder(ValueError):
    """A folder that is not a whole Hugging Face checkpoint."""


class HuggingFaceFolder(WeightsOnly):
    """A `Source` over a folder that `save_pretrained` wrote; slices are read from disk one by one."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            BadFolder: when config.json, a file of weights or a tensor is missing, or a tensor has another shape.
            BadFile: when a file is damaged.
        """
        self.folder, self.config = folder, read_config(folder)
        self._in_file = STORED.get(self.config.family, Stored)
        found = _tensors(folder)
        self.notes = self._check_head(found)
        """What is not as config.json says, as sentences."""
        self._places = {name: self._place(name, shape, found) for name, shape in logical_tensors(self.config).items()}
        self._check_used(found)

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        if name not in self._places:
            raise KeyError(f"{self.folder} has no tensor {name}")
        stored, extent = self._places[name]
        place = list(box[::-1] if stored.transposed else box)
        if stored.parts > 1:
            first = stored.part * (extent.shape[-1] // stored.parts)
            place[-1] = (first + place[-1][0], first + place[-1][1])
        part = extent.read(tuple(place))
        return part.T if stored.transposed else part

    def _check_head(self, found: dict[str, Extent]) -> tuple[str, ...]:
        """Untie a model whose files have a head of other values than the embedding's, as `transformers` 5 does."""
        head, embedding = found.get(HEAD), self._find(EMBEDDING, found)
        if not self.config.tied or head is None or embedding is None or _is_copy(head, embedding):
            return ()
        self.config = self.config.model_copy(update={"tied": False})
        return (f"{HEAD} is another than the embedding and is used, in spite of tie_word_embeddings in {CONFIG}",)

    def _check_used(self, found: dict[str, Extent]) -> None:
        """Refuse tensors that the model has no place for; copies of its head and what config.json implies are none."""
        used = {extent for _, extent in self._places.values()}
        unknown = [n for n, extent in found.items() if extent not in used and not _BUFFERS.fullmatch(n)]
        if self.config.tied:
            unknown = [name for name in unknown if name != HEAD]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise BadFolder(
                f"{self.folder} holds {min(unknown)}{more}, which a model of its {CONFIG} does not have: "
                "give the model's own, or remove what does not belong to it"
            )

    def _find(self, name: str, found: dict[str, Extent]) -> Extent | None:
        """The tensor that holds a logical one, by any of the names that files give it."""
        stored = self._in_file(name).name
        names = (stored, stored.removeprefix("transformer."), stored.removeprefix("model."))
        return next((found[n] for n in names if n in found), None)

    def _place(self, name: str, shape: tuple[int, ...], found: dict[str, Extent]) -> tuple[Stored, Extent]:
        stored = self._in_file(name)
        extent = self._find(name, found)
        if extent is None and name == EMBEDDING and self.config.tied:
            extent = found.get(HEAD)
        if extent is None:
            raise BadFolder(f"{self.folder} lacks the tensor {stored.name}, which its config.json asks for")
        wanted = stored.shape(shape)
        if extent.shape != wanted:
            raise BadFolder(
                f"{stored.name} in {extent.path} has shape {extent.shape}, and config.json asks for {wanted}"
            )
        return stored, extent


def has_weights(folder: Path) -> bool:
    """Whether a folder has files of weights, and not a configuration alone."""
    return any(folder.glob("*.safetensors*")) or any(folder.glob("pytorch_model*"))


def read_words(folder: Path) -> dict[str, Any]:
    """Parse a folder's config.json.

    Raises:
        BadFolder: when there is none, or it is no JSON.
    """
    if not (folder / CONFIG).is_file():
        raise BadFolder(f"{folder} has no config.json: give a folder that save_pretrained wrote")
    return read_object(folder / CONFIG)


def read_config(folder: Path) -> ModelConfig:
    """Read a folder's config.json as a `ModelConfig`, with the end tokens that generation_config.json adds.

    Raises:
        BadFolder: when there is none.
        BadFile: when it describes no possible model.
        UnknownModel: for a family, or a feature, that the block lacks.
    """
    words = read_words(folder)
    return from_huggingface(words | _end_tokens(folder, words))


def _end_tokens(folder: Path, words: dict[str, Any]) -> dict[str, Any]:
    """`eos_token_id` of both files where the second has one: chat models often name the end of a turn there alone."""
    path = folder / GENERATION
    found = read_object(path).get("eos_token_id") if path.is_file() else None
    if found is None:
        return {}
    ends = [
        end for given in (words.get("eos_token_id"), found) for end in (given if isinstance(given, list) else [given])
    ]
    return {"eos_token_id": [end for i, end in enumerate(ends) if end is not None and end not in ends[:i]]}


def read_text_files(folder: Path) -> dict[str, str]:
    """Read the text files beside the weights, the tokenizer's above all."""
    paths = {name: path_inside(folder, name, folder) for name in TEXT_FILES}
    return {name: read_text(path) for name, path in paths.items() if path.is_file()}


def _is_copy(one: Extent, other: Extent) -> bool:
    """Whether two matrices have the same values; they are compared block by block."""
    if one == other:
        return True
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    pairs = zip(_blocks(one), _blocks(other), strict=True)
    if one.dtype == other.dtype:
        return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pairs)
    return all(np.array_equal(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs)


def _blocks(extent: Extent) -> Iterator[NDArray[Any]]:
    rows, columns = extent.shape
    step = max(1, _BLOCK // (8 * columns or 1))
    return (extent.read(((first, min(first + step, rows)), (0, columns))) for first in range(0, rows, step))


def _tensors(folder: Path) -> dict[str, Extent]:
    """All tensors of a folder's files, by the names that they have there."""
    for file, read in _WEIGHTS.items():
        if (folder / file).is_file():
            return read(folder / file)
        index = folder / f"{file}.index.json"
        if index.is_file():
            return _indexed(index, read)
    raise BadFolder(f"{folder} lacks model.safetensors, and has no other file of weights")


def _indexed(index: Path, read: Callable[[Path], dict[str, Extent]]) -> dict[str, Extent]:
    """All tensors of the files that an index names; of a name that several have, the one that the index points to."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise BadFolder(f"{index} does not say which file has which tensor")
    found = {file: _part(index, file, read) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if checked_tensor(name, index) not in found[file]:
            raise BadFolder(f"{index.parent / file} lacks {name}, which {index.name} says it has")
    stored = {name: extent for extents in found.values() for name, extent in extents.items()}
    return stored | {name: found[file][name] for name, file in places.items()}


def _part(index: Path, file: str, read: Callable[[Path], dict[str, Extent]]) -> dict[str, Extent]:
    path = path_inside(index.parent, file, index)
    if not path.is_file():
        raise BadFolder(f"{index.parent} lacks {file}, which {index.name} names")
    return read(path)
