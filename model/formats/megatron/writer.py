"""Writes megatron-core's `torch_dist` checkpoints in parts: every chunk has its offset before any is written."""

import json
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.filesystem import _StorageInfo

from lockstep.distributed.checkpoint.tensors import Source, digest, state_name
from lockstep.model.config import ModelConfig
from lockstep.model.formats.huggingface.families.registry import to_huggingface
from lockstep.model.formats.megatron.arguments import to_megatron
from lockstep.model.formats.megatron.reader import ADAM
from lockstep.model.formats.megatron.tensor_map import Part as Stored
from lockstep.model.formats.megatron.tensor_map import extra_states, other_names, parts, place
from lockstep.model.formats.megatron.torch_dist import BadTorchDist, Piece, Writer
from lockstep.model.formats.recast import Recast
from lockstep.model.formats.target import LARGEST_PART, Part, split, write_whole
from lockstep.model.weights.names import EMBEDDING, logical_tensors


@dataclass(frozen=True)
class Adam:
    """Adam's hyperparameters, which Megatron stores in its parameter groups and resumes with."""

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


@dataclass(frozen=True)
class _Chunk:
    """What a part of the conversion has rows of: a kind of a stored part; and where they go."""

    stored: Stored
    kind: str
    place: _StorageInfo


class MegatronTarget:
    """A folder that megatron-core loads into a GPTModel at any layout, as a `Target`."""

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        source: Recast,
        files: Mapping[str, str],
        *,
        adam: Adam | None = None,
        limit: int = LARGEST_PART,
    ) -> None:
        """
        Args:
            files: name and text of what stands beside the weights, such as the tokenizer's files.
            adam: of the run that is to go on with the optimizer's state, where the source has some.
            limit: bytes of a part at most.

        Raises:
            UnknownModel: when Megatron's arguments, or the family's `config.json`, cannot say this model.
            BadTorchDist: when the source has an optimizer's state other than Adam's.
        """
        shapes, dtype = logical_tensors(model), source.dtype_of(EMBEDDING)
        self._source, self._words, self._adam, self._limit = source, to_megatron(model), adam, limit
        self._files = {"config.json": json.dumps(to_huggingface(model, dtype.name), indent=2), **files}
        self._states = _adams(source, shapes, dtype)
        self._writer = Writer(folder)
        stored = parts({name: place(name, model) for name in shapes}, shapes)
        kinds = [(part, kind) for part in stored for kind in ("", *ADAM) if self._has(part, kind)]
        self._chunks = dict(chunk for part, kind in kinds for chunk in self._placed(part, kind))
        self.parts: Sequence[Part] = [*self._chunks]
        if self._states:
            _name_masters(self._writer, {part.key for part in stored})
        for name in self._writer.names:
            for other in other_names(name):
                self._writer.alias(other, name)
        self._writer.add_empty(extra_states(stored))

    def create(self) -> None:
        """See `Target`."""
        self._writer.create()

    def write(self, part: Part) -> str:
        """See `Target`."""
        chunk = self._chunks[part]
        array = _rows(self._source, chunk.stored, chunk.kind, part.start, part.stop)
        self._writer.write(chunk.place, array[(None,) * len(chunk.stored.lead)])
        return digest(array)

    def finish(self, digests: Mapping[Part, str]) -> None:
        """See `Target`."""
        for name, text in self._files.items():
            (self._writer.folder / name).write_text(text)
        adam = (self._adam or Adam()) if self._states else None
        self._writer.close(_common(self._words, self._source.updates, adam))

    def _has(self, part: Stored, kind: str) -> bool:
        return not kind or state_name(kind, part.tensors[0][0]) in self._states

    def _placed(self, stored: Stored, kind: str) -> Iterator[tuple[Part, _Chunk]]:
        """The chunks of a stored part: of the weights, or of a kind of state."""
        key, rest = _key(kind, stored.key), stored.shape[len(stored.lead) + 1 :]
        dtype = torch.float32 if kind else getattr(torch, self._source.dtype_of(stored.tensors[0][0]).name)
        for part in split(f"{key} {stored.lead}", (stored.rows, *rest), 4, self._limit):
            offset = (*stored.lead, part.start, *(0 for _ in rest))
            extent = (*(1 for _ in stored.lead), part.stop - part.start, *rest)
            place = self._writer.place(Piece(key, stored.shape, offset, extent, dtype))
            yield replace(part, size=place.length), _Chunk(stored, kind, place)


def write(folder: Path, model: ModelConfig, source: Source, files: Mapping[str, str], adam: Adam | None = None) -> None:
    """Write a whole checkpoint in the source's own dtype; see `MegatronTarget`."""
    write_whole(MegatronTarget(folder, model, Recast(source, model, None), files, adam=adam))


def _adams(source: Source, names: Iterable[str], dtype: np.dtype) -> set[str]:
    """The names of Adam's state, if the source has any: weights that are not fp32 have masters, too."""
    states = set(source.states)
    needed = {state_name(kind, name) for name in names for kind in ADAM[1:]}
    missing = (needed if dtype == np.float32 else needed | {state_name("master", EMBEDDING)}) - states
    others = {name for name in states if not name.startswith(ADAM)}
    if states and (missing or others):
        raise BadTorchDist(
            f"the optimizer's state is not Adam's ({min(others or missing)} is {'there' if others else 'missing'}), "
            "and Megatron's is: convert the weights alone"
        )
    return states


def _rows(source: Source, part: Stored, kind: str, first: int, stop: int) -> NDArray[Any]:
    """The stored rows [first, stop) of a part."""
    rest = part.shape[len(part.lead) + 1 :]
    out: NDArray[Any] | None = None
    for name, found, rows in part.tensors:
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
