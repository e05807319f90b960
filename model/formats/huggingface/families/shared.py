"""Helpers that several families share: activations, sliding windows, experts."""

from collections.abc import Callable, Sequence
from typing import Any

from lockstep.model.config import ModelConfig, UnknownModel, need, refuse
from lockstep.model.formats.huggingface.rope import Words

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
ACTIVATION_WORDS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def activation_of(word: str, key: str) -> str:
    """Our name of an activation that config.json names."""
    if word not in _ACTIVATIONS:
        raise UnknownModel(f"this checkpoint uses {key}={word}: supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[word]


def window_fields(window: int | None, types: Sequence[str]) -> Words:
    """Fields for sliding windows in the layers that `layer_types` marks."""
    for kind in types:
        refuse(f"layer_types={kind}", kind not in ("full_attention", "sliding_attention"))
    if window is None or "sliding_attention" not in types:
        return {}
    return {"window": window, "full_layers": tuple(i for i, kind in enumerate(types) if kind == "full_attention")}


def layer_types(config: ModelConfig) -> list[str]:
    """`layer_types` of config.json: full or sliding attention for each layer."""
    windows = (config.window_of(i) for i in range(config.layers))
    return ["full_attention" if w is None else "sliding_attention" for w in windows]


def layer_types_of(words: Words, is_full: Callable[[int], Any]) -> list[str]:
    """`layer_types` of config.json, or the family's rule where it has none."""
    need(words, "num_hidden_layers")
    layers = range(words["num_hidden_layers"])
    types = words.get("layer_types") or ["full_attention" if is_full(i) else "sliding_attention" for i in layers]
    if len(types) != len(layers):
        raise UnknownModel(f"config.json describes no model: layer_types has {len(types)} of {len(layers)} layers")
    return types


def expert_fields(config: ModelConfig, key: str) -> Words:
    """Fields of config.json that describe the experts."""
    assert config.moe is not None
    return {key: config.moe.experts, "num_experts_per_tok": config.moe.experts_per_token}
