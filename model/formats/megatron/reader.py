"""Reads megatron-core's `torch_dist` checkpoints of a GPTModel: weights, and Adam's state where it can be attributed.

Optimizer state has the tensors' names and shapes behind a prefix, in the format that Megatron calls fully reshardable.
Format: https://docs.nvidia.com/megatron-core/developer-guide/latest/api-guide/core/dist_checkpointing.html.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.file_names import path_inside
from lockstep.distributed.checkpoint.tensors import Box, state_name
from lockstep.model.config import ModelConfig, UnknownModel
from lockstep.model.formats.files.reading import read_object, read_text, reading
from lockstep.model.formats.huggingface.families.registry import from_huggingface
from lockstep.model.formats.megatron.arguments import from_megatron
from lockstep.model.formats.megatron.tensor_map import STORED_EMBEDDING, Place, parts, place, variants
from lockstep.model.formats.megatron.torch_dist import BadTorchDist, TorchDist
from lockstep.model.weights.names import logical_tensors

ADAM = ("master", "exp_avg", "exp_avg_sq")
"""Kinds of state that Megatron's optimizers have."""

_TRACKER = "latest_checkpointed_iteration.txt"
_KINDS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "param": "master", "fp32_param": "master"}
"""Megatron's kinds of state: fp32 weights are `param` to its distributed optimizer and `fp32_param` to the other."""
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?P<kind>\w+)\.(?P<key>.+)")
_BUCKET = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\..+")


class MegatronFolder:
    """A `Source` over a folder that Megatron saved: `iter_…` itself, or the folder above with the newest of them."""

    def __init__(self, path: Path, config: ModelConfig | None = None) -> None:
        """
        Args:
            config: the model; by default that of a `config.json` beside the tensors, else that of Megatron's arguments.

        Raises:
            BadTorchDist: when the folder is not whole, or not the model's.
            UnknownModel: for a model that the block does not describe.
        """
        self.folder = _newest(path)
        self._stored = TorchDist(self.folder)
        self._common = self._stored.common()
        self._states: dict[tuple[str, str], str] = {}
        weights = set()
        for key in self._stored.shapes:
            state = _STATE.fullmatch(key)
            if state:
                self._states[_KINDS.get(state["kind"], state["kind"]), state["key"]] = key
            elif not _BUCKET.match(key):
                weights.add(key)
        self.config = config or self._config()
        self._places = {name: self._find(place(name, self.config)) for name in logical_tensors(self.config)}
        self._check(weights)

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        kind, _, tensor = name.rpartition("/")
        if tensor not in self._places or (kind and (kind, self._places[tensor].key) not in self._states):
            raise KeyError(f"{self.folder} has no tensor {name}")
        found = self._places[tensor]
        key = self._states[kind, found.key] if kind else found.key
        if any(start == stop for start, stop in box):
            return self._stored.empty(key, box)
        rows = found.rows(*box[0])
        lead = [(i, i + 1) for i in found.lead]
        array = self._stored.read(key, (*lead, (int(rows[0]), int(rows[-1]) + 1), *box[1:]))
        array = array.reshape(array.shape[len(lead) :])
        picked = array if len(array) == len(rows) else array[rows - rows[0]]
        return picked.astype(np.float32, copy=False) if kind else picked

    @property
    def states(self) -> Sequence[str]:
        """See `Source`.

        Raises:
            BadTorchDist: when there is state that cannot be told apart by the tensors' names.
        """
        sharded = next((key for key in self._stored.names if _BUCKET.match(key)), None)
        if sharded:
            raise BadTorchDist(
                f"{self.folder} keeps its optimizer's state in buckets without names ({sharded}): load it in Megatron "
                "and save with --dist-ckpt-optim-fully-reshardable, or convert the weights alone"
            )
        foreign = {kind for kind, _ in self._states} - {*ADAM}
        if foreign:
            raise BadTorchDist(f"{self.folder} has the state {min(foreign)}, not Adam's: convert the weights alone")
        return tuple(
            state_name(kind, name) for name, found in self._places.items() for kind in ADAM if self._has(kind, found)
        )

    @property
    def updates(self) -> int:
        """See `Source`."""
        with reading(self.folder, "does not say after how many updates it was saved"):
            steps = set(_steps(self._common.get("optimizer", {})))
        if len(steps) > 1:
            raise BadTorchDist(f"{self.folder} has parameters after {sorted(steps)} updates: they must be equally many")
        return steps.pop() if steps else 0

    def _has(self, kind: str, found: Place) -> bool:
        key = self._states.get((kind, found.key))
        if key is None or (kind == "master" and self._stored.dtype(found.key) == torch.float32):
            return False
        if self._stored.shapes[key] != self._stored.shapes[found.key]:
            raise BadTorchDist(
                f"{self.folder} keeps {key} in flat parts: load it in Megatron 0.14 or later and save it again with "
                "--dist-ckpt-optim-fully-reshardable"
            )
        return True

    def _config(self) -> ModelConfig:
        beside = self.folder / "config.json"
        if beside.is_file():
            return from_huggingface(read_object(beside))
        words = self._common.get("args", self._common.get("config"))
        if words is None:
            raise UnknownModel(f"{self.folder} does not say which model it holds: put the model's config.json into it")
        with reading(self.folder, "does not say which model it holds"):
            rows = self._stored.shapes.get(STORED_EMBEDDING, (0,))[0]
            return from_megatron(words if isinstance(words, Mapping) else vars(words), rows)

    def _find(self, stacked: Place) -> Place:
        found = next((p for p in variants(stacked) if p.key in self._stored.shapes), None)
        if found is None:
            raise BadTorchDist(f"{self.folder} lacks {stacked.key}, which a model of its configuration has")
        return found

    def _check(self, weights: set[str]) -> None:
        """Refuse shapes that are not the model's, and tensors that the model lacks."""
        for part in parts(self._places, logical_tensors(self.config)):
            found, shape = self._stored.shapes[part.key], part.shape
            padded = part.is_vocabulary and found[1:] == shape[1:] and found[0] > shape[0]
            if found != shape and not padded:
                raise BadTorchDist(f"{part.key} in {self.folder} is {found}, and the model's would be {shape}")
        known = {one.key for name in self._places for one in variants(place(name, self.config))}
        if weights - known:
            raise BadTorchDist(f"{self.folder} holds {min(weights - known)}, which a model of its configuration lacks")


def _newest(path: Path) -> Path:
    tracker = path / _TRACKER
    if not tracker.is_file():
        return path
    said = read_text(tracker).strip()
    return path_inside(path, f"iter_{said:0>7}" if said.isdecimal() else said, tracker)


def _steps(state: Any) -> Iterator[int]:
    """Every count of updates in an optimizer's state, whichever optimizer it was."""
    if isinstance(state, Mapping):
        for word, value in state.items():
            if word in ("step", "common_step") and value is not None:
                yield int(value)
            else:
                yield from _steps(value)
    elif isinstance(state, list | tuple):
        for part in state:
            yield from _steps(part)
