"""LoRA adapters as logical tensors: added to a source, or merged into its weights; `layers/lora.py` computes."""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lockstep.distributed.checkpoint.tensors import Box, Source, WeightsOnly, to_numpy, to_torch
from lockstep.model.config import LoraConfig, ModelConfig
from lockstep.model.weights.names import LORA_A, LORA_B, is_adapter, logical_tensors
from lockstep.model.weights.overlay import NewTensors


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Merge an adapter into a weight: weight + scale · b · a, computed in fp64 and rounded once to the weight's dtype.

    Sums of so few products of bf16 numbers are exact in fp64, so the bits do not depend on how a weight is split.
    """
    return (b.double() @ a.double()).mul(scale).add_(weight).to(weight.dtype)


def with_adapters(model: ModelConfig, source: Source, lora: LoraConfig | None, seed: int) -> tuple[ModelConfig, Source]:
    """Add LoRA adapters to a model and its source; both are unchanged where the model has the same adapters already.

    B is 0 and A uniform within ±1 / √inputs, as in PEFT; each A is drawn from (seed, its name), so the same in any
    layout. Other adapters that the model has are merged into its weights first.

    Raises:
        ValueError: when the model lacks a target.
    """
    if lora is None:
        return merged(model, source)
    wanted = ModelConfig(**model.model_dump() | {"lora": lora.model_dump()})
    wanted = wanted.model_copy(update={"lora": lora.model_copy(update={"targets": wanted.adapted})})
    if model.lora == wanted.lora:
        return model, source
    if model.lora is not None:
        model, source = merged(model, source)
    shapes = {name: shape for name, shape in logical_tensors(wanted).items() if is_adapter(name)}
    return wanted, NewTensors(source, {name: _drawn(name, shape, seed) for name, shape in shapes.items()})


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    if name.endswith(LORA_B):
        return np.zeros(shape, np.float32)
    bound = 1 / math.sqrt(shape[1])
    drawn = np.random.default_rng([seed, *name.encode()]).random(shape, dtype=np.float32)
    return (2 * drawn - 1) * np.float32(bound)


class MergedSource(WeightsOnly):
    """A `Source` that merges adapters: of a model without adapters, over a source of the same model with them."""

    def __init__(self, model: ModelConfig, source: Source) -> None:
        assert model.lora is not None
        self._shapes, self._source, self._scale = logical_tensors(model), source, model.lora.scale

    def read(self, name: str, box: Box) -> NDArray[np.generic]:
        """See `Source`. There is no optimizer state: the adapters' own is left out."""
        weight, stem = self._source.read(name, box), name.removesuffix("weight")
        if stem == name or stem + LORA_A not in self._shapes:
            return weight
        rank = self._shapes[stem + LORA_A][0]
        a = self._source.read(stem + LORA_A, ((0, rank), box[1]))
        b = self._source.read(stem + LORA_B, (box[0], (0, rank)))
        return to_numpy(merge(to_torch(weight), to_torch(a), to_torch(b), self._scale))


def merged(model: ModelConfig, source: Source) -> tuple[ModelConfig, Source]:
    """Merge a model's adapters into its source; a model without adapters is unchanged."""
    if model.lora is None:
        return model, source
    return model.without_adapters, MergedSource(model, source)
