"""Reads Hugging Face folders: safetensors or .bin files, sharded or not, `config.json` and tokenizer files.

Files name their tensors as `model/weights/names.py` does, except GPT-2's and Mixtral's. In GPT-2's, q, k and v are one
tensor, linear layers are stored as [inputs, outputs], and blocks are called `transformer.h` (or `h`, in files of the
bare model); Mixtral's have words of their own for experts.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import ValidationError

from lockstep.distributed.checkpoint.tensors import Box, WeightsOnly
from lockstep.model.config import ModelConfig
from lockstep.model.formats.files.extents import Extent, left_out
from lockstep.model.formats.files.safetensors import read_header
from lockstep.model.formats.files.torch_pickle import read_torch
from lockstep.model.formats.huggingface.families.registry import from_huggingface
from lockstep.model.formats.huggingface.tensor_names import STORED, Stored
from lockstep.model.weights.names import EMBEDDING, HEAD, logical_tensors

CONFIG, GENERATION = "config.json", "generation_config.json"
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
"""What a folder has besides its weights and its configuration, and every conversion keeps."""

_WEIGHTS = {"model.safetensors": read_header, "pytorch_model.bin": read_torch}


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
        self._places = {name: self._place(name, shape, found) for name, shape in logical_tensors(self.config).items()}
        self.notes = self._notes(found)
        """What of the folder does not come along, as sentences."""

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

    def _notes(self, found: dict[str, Extent]) -> tuple[str, ...]:
        used = {extent for _, extent in self._places.values()}
        return left_out(name for name, extent in found.items() if extent not in used)

    def _place(self, name: str, shape: tuple[int, ...], found: dict[str, Extent]) -> tuple[Stored, Extent]:
        stored = self._in_file(name)
        names = [stored.name, stored.name.removeprefix("transformer."), stored.name.removeprefix("model.")]
        if name == EMBEDDING and self.config.tied:
            names.append(HEAD)
        extent = next((found[n] for n in names if n in found), None)
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
    return _json(folder / CONFIG)


def read_config(folder: Path) -> ModelConfig:
    """Read a folder's config.json as a `ModelConfig`.

    Raises:
        BadFolder: when there is none, or it describes no possible model.
        UnknownModel: for a family, or a feature, that the block lacks.
    """
    try:
        return from_huggingface(read_words(folder))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = str(first.get("ctx", {}).get("error", "")) or f"{first['loc'][0]}: {first['msg']}"
        raise BadFolder(f"{folder / CONFIG} describes no model: {reason}") from error


def read_text_files(folder: Path) -> dict[str, str]:
    """Read the text files beside the weights, the tokenizer's above all."""
    return {name: (folder / name).read_text() for name in TEXT_FILES if (folder / name).is_file()}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadFolder(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadFolder(f"{path} holds no JSON object")
    return found


def _tensors(folder: Path) -> dict[str, Extent]:
    """All tensors of a folder's files, by the names that they have there."""
    for file, read in _WEIGHTS.items():
        index = folder / f"{file}.index.json"
        if index.is_file():
            return _indexed(index, read)
        if (folder / file).is_file():
            return read(folder / file)
    raise BadFolder(f"{folder} lacks model.safetensors, and has no other file of weights")


def _indexed(index: Path, read: Callable[[Path], dict[str, Extent]]) -> dict[str, Extent]:
    files: dict[str, str] = _json(index).get("weight_map", {})
    found: dict[str, dict[str, Extent]] = {}
    for file in sorted(set(files.values())):
        if not (index.parent / file).is_file():
            raise BadFolder(f"{index.parent} lacks {file}, which {index.name} names")
        found[file] = read(index.parent / file)
    for name, file in files.items():
        if name not in found[file]:
            raise BadFolder(f"{index.parent / file} lacks {name}, which {index.name} says it has")
    return {name: found[file][name] for name, file in files.items()}
