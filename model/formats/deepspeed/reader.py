"""Reads DeepSpeed checkpoints, ZeRO 0 to 3 and universal, without DeepSpeed and without unpickling code.

Two kinds of names are understood: those of a Hugging Face model, which one model-parallel rank holds whole, and those
of Lockstep's own `Transformer` in any tensor and pipeline layout. fp32 masters and moments are the optimizer's own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.file_names import path_inside
from lockstep.distributed.checkpoint.tensors import STATES, Box, overlap, state_name, to_numpy, within
from lockstep.model.config import ModelConfig
from lockstep.model.formats.deepspeed.stored_tensors import BadDeepSpeedFolder, FlatTensor
from lockstep.model.formats.deepspeed.tensor_map import Place, places_of
from lockstep.model.formats.deepspeed.zero_files import read_folder
from lockstep.model.formats.files.reading import read_object, read_text, reading
from lockstep.model.formats.huggingface.families.registry import from_huggingface


class DeepSpeedFolder:
    """A `Source` over what `engine.save_checkpoint` or DeepSpeed's `ds_to_universal` wrote.

    ZeRO 3 and universal checkpoints have no weights of the model's own dtype: the fp32 weights, rounded to it, are the
    weights, as they are in the run itself.
    """

    def __init__(self, path: Path, config: ModelConfig | None = None) -> None:
        """
        Args:
            path: the folder given to `save_checkpoint`, whose file `latest` names a folder in it, or that folder.
            config: the model; a `config.json` in either folder otherwise.

        Raises:
            BadDeepSpeedFolder: says which file or parameter is missing, or does not fit the model.
        """
        self.folder = step_folder(path)
        self.config = config or _config_beside(self.folder)
        with reading(self.folder):
            self._ranks = read_folder(self.folder)
            self._places = places_of(self.config, self._ranks)
            self.updates = self._ranks[0].updates
            states = ((kind, name, found) for kind in STATES for name, found in self._places.items())
            self.states = tuple(state_name(kind, name) for kind, name, found in states if self._has(kind, found))

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`. Only the rows of the files that the box needs are read, unless the file has them transposed."""
        kind, _, tensor = name.rpartition("/")
        if tensor not in self._places:
            raise KeyError(f"{self.folder} has no tensor {name}")
        if any(start == stop for start, stop in box):
            dtype = self._stored(self._places[tensor][0], kind).dtype
            return to_numpy(torch.empty([stop - start for start, stop in box], dtype=dtype))
        places = {part: place for place in self._places[tensor] if (part := overlap(place.box, box))}
        arrays = {part: self._part(place, part, kind) for part, place in places.items()}
        result = np.empty([b - a for a, b in box], next(iter(arrays.values())).dtype)
        for part, array in arrays.items():
            result[within(part, box)] = array
        return result

    def _has(self, kind: str, places: Sequence[Place]) -> bool:
        if kind == "master" and self._weight(places[0]).dtype == torch.float32:
            return False
        return all(place.name in self._ranks[place.rank].states.get(kind, {}) for place in places)

    def _part(self, place: Place, part: Box, kind: str) -> NDArray[Any]:
        """The part of a logical tensor, which lies in a place."""
        lead = len(place.local) - len(part)
        file_part, file_box = (b[::-1] if place.transposed else b for b in (part, place.box))
        inside = zip(file_part, file_box, place.local[lead:], strict=True)
        local = tuple((p - whole + at, q - whole + at) for (p, q), (whole, _), (at, _) in inside)
        found = self._stored(place, kind).read((*place.local[:lead], *local)).flatten(0, lead)
        return to_numpy(found.t() if place.transposed else found)

    def _stored(self, place: Place, kind: str) -> FlatTensor:
        states = self._ranks[place.rank].states
        return states[kind][place.name] if kind else self._weight(place)

    def _weight(self, place: Place) -> FlatTensor:
        return self._ranks[place.rank].weights[place.name]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a DeepSpeed checkpoint; a `config.json` may lie in it, too."""
    return path.is_dir() and any(step_folder(path).glob("*mp_rank_*_model_states.pt"))


def step_folder(path: Path) -> Path:
    """The folder that has the files of a step: the one given, or the newest in it.

    Raises:
        BadDeepSpeedFolder: when it is not there.
    """
    for latest in (path / "latest", path / "latest_universal"):
        if latest.is_file():
            path = path_inside(path, read_text(latest).strip(), latest)
            break
    if not path.is_dir():
        raise BadDeepSpeedFolder(f"there is no folder {path}: give the one that save_checkpoint was given")
    return path


def _config_beside(folder: Path) -> ModelConfig:
    for place in (folder, folder.parent):
        if (place / "config.json").is_file():
            return from_huggingface(read_object(place / "config.json"))
    raise BadDeepSpeedFolder(
        f"{folder} does not say which model it is of: put the model's config.json into it, or give a configuration"
    )
