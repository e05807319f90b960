"""Writes DeepSpeed universal checkpoints in parts: fp32 weights and moments, a file for each parameter and kind.

The files are `torch.save`'s, made without their numbers, which are then written where they belong.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.tensors import Box, digest, overlap, state_name, whole, within
from lockstep.model.config import ModelConfig
from lockstep.model.formats.deepspeed.tensor_map import Place, huggingface_places
from lockstep.model.formats.deepspeed.zero_files import MOMENTS
from lockstep.model.formats.files.extents import Extent
from lockstep.model.formats.files.torch_pickle import read_torch
from lockstep.model.formats.huggingface.families.registry import to_huggingface
from lockstep.model.formats.recast import Recast
from lockstep.model.formats.target import LARGEST_PART, Part, split, write_whole
from lockstep.model.weights.names import EMBEDDING, logical_tensors

FORMAT = "0.19.8"
"""The version of DeepSpeed whose universal checkpoints are written; DeepSpeed refuses to load without one."""

GROUPS = 1024
"""Groups of parameters that a run may have at most: DeepSpeed passes silently over those that a checkpoint lacks."""

_ADAM = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}

Stack = list[tuple[str, Place]]
"""The logical tensors in a parameter, and where they lie there."""


class UniversalTarget:
    """A universal checkpoint of a Hugging Face model, which DeepSpeed loads into ZeRO 1, 2 and 3, as a `Target`.

    The script that continues says `{"checkpoint": {"load_universal": true}}` and calls
    `engine.load_checkpoint(folder, load_lr_scheduler_states=False)`. Its learning rates and other settings stay as they
    are. What has no state in the source gets what Adam begins with, moments of 0.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        source: Recast,
        files: Mapping[str, str],
        *,
        limit: int = LARGEST_PART,
    ) -> None:
        """
        Args:
            folder: gets `latest_universal`, `config.json`, and a folder for the step.
            files: name and text of what stands beside the weights, such as the tokenizer's files.
            limit: bytes of a part at most.

        Raises:
            UnknownModel: when no Hugging Face family has words for the model.
        """
        self._folder, self._source, self._files = folder, source, files
        self._dtype = source.dtype_of(EMBEDDING).name
        self._words = to_huggingface(model, self._dtype)
        self._step = folder / f"global_step{source.updates}_universal"
        self._stored = _stored(model)
        self._given = {state_name("master", name): name for name in logical_tensors(model)}
        self._given |= {name: name for name in source.states}
        self._held = {
            f"{name}/{file}.pt": (kind, stack)
            for name, stack in self._stored.items()
            for file, kind in self._kinds(stack).items()
        }
        self.parts: Sequence[Part] = [
            part for file, (_, stack) in self._held.items() for part in split(file, _shape(stack), 4, limit)
        ]

    def create(self) -> None:
        """See `Target`."""
        step = torch.tensor(float(self._source.updates))
        for name in self._stored:
            (self._step / "zero" / name).mkdir(parents=True, exist_ok=True)
            torch.save(step, self._step / "zero" / name / "step.pt")
        for file, (_, stack) in self._held.items():
            path = self._step / "zero" / file
            if not path.exists():
                new = path.with_suffix(".new")
                with torch.serialization.skip_data():
                    torch.save({"param": torch.empty(_shape(stack))}, new)
                new.rename(path)

    def write(self, part: Part) -> str:
        """See `Target`."""
        rows = self._rows(part)
        _extent(self._step / "zero" / part.tensor).write(part.start, rows)
        return digest(rows)

    def finish(self, digests: Mapping[Part, str]) -> None:
        """See `Target`."""
        updates = self._source.updates
        torch.save(_optimizer_state(updates), self._step / "zero" / "optimizer_state.pt")
        states = _model_states(self._stored, getattr(torch, self._dtype), updates)
        for prefix in ("", "zero_pp_rank_0_"):  # ZeRO 3 looks for the other name
            torch.save(states, self._step / f"{prefix}mp_rank_00_model_states.pt")
        own = {"config.json": json.dumps(self._words, indent=2), "latest_universal": self._step.name}
        for name, text in {**self._files, **own}.items():
            (self._folder / name).write_text(text)

    def _kinds(self, stack: Stack) -> dict[str, str]:
        """The kinds of state that a parameter has files of."""
        moments = {
            file: kind
            for file, kind in MOMENTS.items()
            if any(state_name(kind, name) in self._given for name, _ in stack)
        }
        return {"fp32": "master"} | (moments or _ADAM)

    def _rows(self, part: Part) -> NDArray[Any]:
        """Rows of a kind of a parameter's state in fp32, or of its weights; 0 where the source gives none."""
        kind, stack = self._held[part.tensor]
        wanted: Box = ((part.start, part.stop), *whole(_shape(stack)[1:]))
        rows = np.zeros([b - a for a, b in wanted], np.float32)
        for name, place in stack:
            common = overlap(place.local, wanted)
            if common and state_name(kind, name) in self._given:
                value = self._source.read(self._given[state_name(kind, name)], _inside(place, common))
                room = rows[within(common, wanted)]
                room[...] = (value.T if place.transposed else value).reshape(room.shape)
        return rows


def write_universal(folder: Path, model: ModelConfig, source: Recast, files: Mapping[str, str]) -> None:
    """Write a whole universal checkpoint; see `UniversalTarget`."""
    write_whole(UniversalTarget(folder, model, source, files))


def _stored(model: ModelConfig) -> dict[str, Stack]:
    """The parameters of the model in `transformers`."""
    found: dict[str, Stack] = {}
    for name, shape in logical_tensors(model).items():
        place = next(huggingface_places(name, shape, model))
        found.setdefault(place.name, []).append((name, place))
    return found


def _shape(stack: Stack) -> tuple[int, ...]:
    """Of a parameter."""
    return tuple(max(stops) for stops in zip(*([stop for _, stop in place.local] for _, place in stack), strict=True))


def _inside(place: Place, part: Box) -> Box:
    """The part of a logical tensor that lies in a part of its place in the file."""
    lead = len(place.local) - len(place.box)
    found = [(a - at, b - at) for (a, b), (at, _) in zip(part[lead:], place.local[lead:], strict=True)]
    logical = found[::-1] if place.transposed else found
    return tuple((a + start, b + start) for (a, b), (start, _) in zip(logical, place.box, strict=True))


@lru_cache(8)
def _extent(path: Path) -> Extent:
    """Where the numbers of a file lie."""
    return read_torch(path)["param"]


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
