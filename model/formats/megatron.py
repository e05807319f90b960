"""Megatron-core's `torch_dist` folders of a GPTModel: weights, and Adam's state where a name says whose it is.

Optimizer state has the tensors' names and shapes behind a prefix, in the format that Megatron calls fully reshardable.
Format: https://docs.nvidia.com/megatron-core/developer-guide/latest/api-guide/core/dist_checkpointing.html.
"""

import json
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.spec import Box, Source, state_name, to_numpy
from lockstep.model.config import ModelConfig, UnknownModel
from lockstep.model.families import from_huggingface, to_huggingface
from lockstep.model.formats.megatron_names import (
    STORED_EMBEDDING,
    Part,
    Place,
    extra_states,
    parts,
    place,
    spellings,
    variants,
)
from lockstep.model.formats.megatron_words import from_megatron, to_megatron
from lockstep.model.formats.torch_dist import BadTorchDist, Piece, TorchDist, Writer, rows_of_chunk
from lockstep.model.names import EMBEDDING, logical_tensors

_TRACKER = "latest_checkpointed_iteration.txt"
_ADAM = ("master", "exp_avg", "exp_avg_sq")
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
            return to_numpy(torch.empty([stop - start for start, stop in box], dtype=self._stored.dtype(key)))
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
        foreign = {kind for kind, _ in self._states} - {*_ADAM}
        if foreign:
            raise BadTorchDist(f"{self.folder} has the state {min(foreign)}, not Adam's: convert the weights alone")
        return tuple(
            state_name(kind, name) for name, found in self._places.items() for kind in _ADAM if self._has(kind, found)
        )

    @property
    def updates(self) -> int:
        """See `Source`."""
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
            return from_huggingface(json.loads(beside.read_text()))
        words = self._common.get("args", self._common.get("config"))
        if words is None:
            raise UnknownModel(f"{self.folder} does not say which model it holds: put the model's config.json into it")
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
    said = tracker.read_text().strip()
    return path / (f"iter_{int(said):07d}" if said.isdecimal() else said)


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


@dataclass(frozen=True)
class Adam:
    """How the optimizer goes on from its state: what Megatron writes into its parameter groups and resumes with."""

    lr: float = 1e-4
    """Also the highest of the schedule; from 0.17, Megatron finds its groups by this and `min_lr`."""
    min_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def state(self, updates: int) -> dict[str, Any]:
        """What has no shape, and Megatron's two groups: matrices, and what is not decayed."""
        common = {
            "lr": self.lr,
            "max_lr": self.lr,
            "min_lr": self.min_lr,
            "betas": self.betas,
            "eps": self.eps,
            "lr_mult": 1.0,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
            "default_config": True,
            "step": updates,
        }
        groups = [common | {"wd_mult": mult, "weight_decay": mult * self.weight_decay} for mult in (1.0, 0.0)]
        return {"param_groups": groups, "state": {"common_step": updates}}


def write(
    folder: Path, model: ModelConfig, source: Source, tokenizer: Mapping[str, str], adam: Adam | None = None
) -> None:
    """Write a folder that megatron-core loads into a GPTModel at any layout; a chunk at a time is in memory.

    Args:
        tokenizer: file name → text of the tokenizer's files.
        adam: of the run that is to go on with the optimizer's state, where the source has some.

    Raises:
        UnknownModel: when Megatron's arguments, or the family's `config.json`, cannot say this model.
        BadTorchDist: when the source has an optimizer's state other than Adam's.
    """
    words, shapes = to_megatron(model), logical_tensors(model)
    dtype = source.read(EMBEDDING, ((0, 1), (0, 1))).dtype
    config = to_huggingface(model, str(dtype))
    states = _adams(source, shapes, dtype)
    writer = Writer(folder)
    stored = parts({name: place(name, model) for name in shapes}, shapes)
    for part in stored:
        for kind in ("", *_ADAM):
            if not kind or state_name(kind, part.held[0][0]) in states:
                writer.add(_pieces(source, part, kind))
    if states:
        _name_masters(writer, {part.key for part in stored})
    for name in writer.names:
        for other in spellings(name):
            writer.alias(other, name)
    writer.add_empty(extra_states(stored))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, text in tokenizer.items():
        (folder / name).write_text(text)
    writer.close(_common(words, source.updates, (adam or Adam()) if states else None))


def _adams(source: Source, names: Iterable[str], dtype: np.dtype) -> set[str]:
    """The names of Adam's state, if the source has any: weights that are not fp32 have masters, too."""
    states = set(source.states)
    needed = {state_name(kind, name) for name in names for kind in _ADAM[1:]}
    missing = (needed if dtype == np.float32 else needed | {state_name("master", EMBEDDING)}) - states
    others = {name for name in states if not name.startswith(_ADAM)}
    if states and (missing or others):
        raise BadTorchDist(
            f"the optimizer's state is not Adam's ({min(others or missing)} is {'there' if others else 'missing'}), "
            "and Megatron's is: convert the weights alone"
        )
    return states


def _pieces(source: Source, part: Part, kind: str) -> Iterator[Piece]:
    """The chunks of a part: of the weights, or of a kind of state."""
    rest = part.shape[len(part.lead) + 1 :]
    step = rows_of_chunk((part.rows, *rest), 4)
    for first in range(0, part.rows, step):
        array = _rows(source, part, kind, first, min(first + step, part.rows))
        offset = (*part.lead, first, *(0 for _ in rest))
        yield Piece(_key(kind, part.key), part.shape, offset, array[(None,) * len(part.lead)])


def _rows(source: Source, part: Part, kind: str, first: int, stop: int) -> NDArray[Any]:
    """The stored rows [first, stop) of a part."""
    rest = part.shape[len(part.lead) + 1 :]
    out: NDArray[Any] | None = None
    for name, found, rows in part.held:
        at = found.rows(0, rows)
        a, b = (int(i) for i in np.searchsorted(at, (first, stop)))
        if a < b:
            read = source.read(state_name(kind, name) if kind else name, ((a, b), *((0, n) for n in rest)))
            out = np.empty((stop - first, *rest), read.dtype) if out is None else out
            out[at[a:b] - first] = read
    assert out is not None
    return out


def _key(kind: str, key: str) -> str:
    return f"optimizer.state.{'param' if kind == 'master' else kind}.{key}" if kind else key


def _name_masters(writer: Writer, keys: Iterable[str]) -> None:
    """Where weights are fp32 they are their own masters, and masters have the names that either optimizer asks for."""
    for key in keys:
        if _key("master", key) not in writer.names:
            writer.alias(_key("master", key), key)
        writer.alias(f"optimizer.state.fp32_param.{key}", _key("master", key))


def _common(words: dict[str, Any], updates: int, adam: Adam | None) -> dict[str, Any]:
    parallel = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "world_size": 1}
    saved = {"no_save_optim": adam is None, "no_save_rng": True, "ckpt_format": "torch_dist"}
    common = {
        "args": Namespace(**words, **parallel, **saved),
        "checkpoint_version": 3.0,
        "iteration": updates,
        "content_metadata": {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
        },
    }
    if adam is None:
        return common
    # Within another `optimizer` for the optimizers of bf16 models and the distributed one, without for that of fp32.
    return common | {
        "optimizer": {
            "optimizer": adam.state(updates),
            "param_state_sharding_type": "fully_reshardable",
            **adam.state(updates),
        }
    }
