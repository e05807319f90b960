"""DeepSpeed checkpoints, ZeRO 0 to 3 and universal: read without DeepSpeed, and without unpickling anything that runs.

Two kinds of names are understood: those of a Hugging Face model, which one model-parallel rank holds whole, and those
of Lockstep's own `Transformer` in any tensor and pipeline layout. fp32 masters and moments are the optimizer's own.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lockstep.distributed.checkpoint.spec import STATES, Box, Source, overlap, state_name, to_numpy, to_torch, within
from lockstep.model.config import ModelConfig
from lockstep.model.families import from_huggingface, to_huggingface
from lockstep.model.formats.deepspeed_places import Place, huggingface_places, places_of
from lockstep.model.formats.deepspeed_tensors import BadDeepSpeedFolder, Laid
from lockstep.model.formats.deepspeed_zero import MOMENTS, read_folder
from lockstep.model.names import logical_tensors


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
        self._held = read_folder(self.folder)
        self._places = places_of(self.config, self._held)
        self.updates = self._held[0].updates
        self.states = tuple(
            state_name(kind, name) for kind in STATES for name, found in self._places.items() if self._has(kind, found)
        )

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`. Only the rows of the files that the box needs are read, unless the file has them transposed."""
        kind, _, tensor = name.rpartition("/")
        if tensor not in self._places:
            raise KeyError(f"{self.folder} has no tensor {name}")
        if any(start == stop for start, stop in box):
            dtype = self._laid(self._places[tensor][0], kind).dtype
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
        return all(place.name in self._held[place.rank].states.get(kind, {}) for place in places)

    def _part(self, place: Place, part: Box, kind: str) -> NDArray[Any]:
        """The part of a logical tensor, which lies in a place."""
        lead = len(place.local) - len(part)
        file_part, file_box = (b[::-1] if place.transposed else b for b in (part, place.box))
        inside = zip(file_part, file_box, place.local[lead:], strict=True)
        local = tuple((p - whole + at, q - whole + at) for (p, q), (whole, _), (at, _) in inside)
        found = self._laid(place, kind).read((*place.local[:lead], *local)).flatten(0, lead)
        return to_numpy(found.t() if place.transposed else found)

    def _laid(self, place: Place, kind: str) -> Laid:
        states = self._held[place.rank].states
        return states[kind][place.name] if kind else self._weight(place)

    def _weight(self, place: Place) -> Laid:
        return self._held[place.rank].weights[place.name]


def is_checkpoint(path: Path) -> bool:
    """Whether `DeepSpeedFolder` is the one to read a folder; a `config.json` may lie in it, too."""
    return path.is_dir() and any(step_folder(path).glob("*mp_rank_*_model_states.pt"))


def step_folder(path: Path) -> Path:
    """The folder that has the files: the one given, or the newest in it.

    Raises:
        BadDeepSpeedFolder: when it is not there.
    """
    for latest in (path / "latest", path / "latest_universal"):
        if latest.is_file():
            path = path / latest.read_text().strip()
            break
    if not path.is_dir():
        raise BadDeepSpeedFolder(f"there is no folder {path}: give the one that save_checkpoint was given")
    return path


def _config_beside(folder: Path) -> ModelConfig:
    for place in (folder, folder.parent):
        if (place / "config.json").is_file():
            return from_huggingface(json.loads((place / "config.json").read_text()))
    raise BadDeepSpeedFolder(
        f"{folder} does not say which model it is of: put the model's config.json into it, or give a configuration"
    )


FORMAT = "0.19.8"
"""The version of DeepSpeed whose universal checkpoints are written; DeepSpeed refuses to load without one."""

GROUPS = 1024
"""Groups of parameters that a run may have at most: DeepSpeed passes silently over those that a checkpoint lacks."""


def write_universal(
    folder: Path, model: ModelConfig, source: Source, tokenizer: Mapping[str, str] | None = None
) -> Path:
    """Write a universal checkpoint of a Hugging Face model, which DeepSpeed loads into ZeRO 1, 2 and 3.

    The script that continues says `{"checkpoint": {"load_universal": true}}` and calls
    `engine.load_checkpoint(folder, load_lr_scheduler_states=False)`. Its learning rates and other settings stay as they
    are. What has no state in the source gets what Adam begins with, moments of 0.

    Args:
        folder: gets `latest_universal`, `config.json`, and a folder for the step; whole tensors are written one by one.
        tokenizer: file name → text of the tokenizer's files.

    Returns:
        The folder for the step.

    Raises:
        UnknownModel: when no Hugging Face family has words for the model.
    """
    dtype = _dtype_of(source, model)
    words = json.dumps(to_huggingface(model, str(dtype).removeprefix("torch.")), indent=2)
    step = folder / f"global_step{source.updates}_universal"
    (step / "zero").mkdir(parents=True)
    stored = _stored(model)
    given = {state_name("master", name): name for name in logical_tensors(model)} | {n: n for n in source.states}
    for name, stack in stored.items():
        _write_parameter(step / "zero" / name, stack, source, given)
    torch.save(_optimizer_state(source.updates), step / "zero" / "optimizer_state.pt")
    for prefix in ("", "zero_pp_rank_0_"):  # ZeRO 3 looks for the other name
        torch.save(_model_states(stored, dtype, source.updates), step / f"{prefix}mp_rank_00_model_states.pt")
    for file, text in {**(tokenizer or {}), "config.json": words, "latest_universal": step.name}.items():
        (folder / file).write_text(text)
    return step


def _dtype_of(source: Source, model: ModelConfig) -> torch.dtype:
    name, shape = next(iter(logical_tensors(model).items()))
    return to_torch(source.read(name, tuple((0, 1) for _ in shape))).dtype


_ADAM = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

Stack = list[tuple[str, Place]]
"""The logical tensors in a parameter, and where they lie there."""


def _stored(model: ModelConfig) -> dict[str, Stack]:
    """The parameters of the model in `transformers`."""
    found: dict[str, Stack] = {}
    for name, shape in logical_tensors(model).items():
        place = next(huggingface_places(name, shape, model))
        found.setdefault(place.name, []).append((name, place))
    return found


def _write_parameter(folder: Path, stack: Stack, source: Source, given: Mapping[str, str]) -> None:
    folder.mkdir()
    moments = {
        file: kind for file, kind in MOMENTS.items() if any(state_name(kind, name) in given for name, _ in stack)
    }
    for file, kind in ({"fp32": "master"} | (moments or _ADAM)).items():
        torch.save({"param": _whole(kind, stack, source, given)}, folder / f"{file}.pt")
    torch.save(torch.tensor(float(source.updates)), folder / "step.pt")


def _whole(kind: str, stack: Stack, source: Source, given: Mapping[str, str]) -> Tensor:
    """A kind of a parameter's state in fp32, or its weights; 0 where the source gives none."""
    whole = torch.zeros([max(stops) for stops in zip(*([b for _, b in p.local] for _, p in stack), strict=True)])
    for name, place in stack:
        if state_name(kind, name) in given:
            value = to_torch(source.read(given[state_name(kind, name)], place.box))
            whole[tuple(slice(a, b) for a, b in place.local)] = value.t() if place.transposed else value
    return whole


def _optimizer_state(updates: int) -> dict[str, Any]:
    """What ZeRO 1 and 2 read, and under `optimizer_state_dict` what ZeRO 3 reads; a group's settings are the run's."""
    inner = {"state": {0: {"step": torch.tensor(float(updates))}}, "param_groups": [{"params": []}]}
    return {"ds_version": FORMAT, "param_groups": [{"params": []}] * GROUPS, "optimizer_state_dict": inner}


def _model_states(names: Iterable[str], dtype: torch.dtype, updates: int) -> dict[str, Any]:
    """As ZeRO 3 writes them: the module's parameters are empty, and say what they were rounded to."""
    return {
        "module": {name: torch.empty(0, dtype=dtype) for name in names},
        "buffer_names": [],
        "global_steps": updates,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": FORMAT,
    }
