"""Qwen 2 and 3, dense and mixture of experts: config.json to and from ModelConfig."""

from typing import Any

from lockstep.model.config import ModelConfig, MoEConfig, UnknownModel, need, refuse
from lockstep.model.formats.huggingface.families.llama import read_llama, write_llama
from lockstep.model.formats.huggingface.families.shared import expert_fields, layer_types, layer_types_of, window_fields
from lockstep.model.formats.huggingface.rope import Words


def read_qwen2(words: Words) -> Words:
    """Fields of a Qwen 2 model."""
    window = words["sliding_window"] if words["use_sliding_window"] else None
    full = words["max_window_layers"]
    return (
        read_llama(words)
        | {"biases": ("qkv",)}
        | window_fields(window, layer_types_of(words, lambda layer: layer < full))
    )


def write_qwen(config: ModelConfig) -> Words:
    """config.json of a dense Qwen 2 or 3 model."""
    types = layer_types(config)
    return write_llama(config) | {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": (*types, "sliding_attention").index("sliding_attention"),
        "layer_types": types,
    }


def read_qwen3(words: Words) -> Words:
    """Fields of a Qwen 3 model."""
    biases = read_llama(words | {"mlp_bias": False})["biases"]
    return read_qwen2(words) | {"biases": biases, "qk_norm": "head"}


def _read_qwen_experts(words: Words, **shared: Any) -> MoEConfig:
    for feature, present in {
        "mlp_only_layers": words.get("mlp_only_layers"),
        "decoder_sparse_step": words["decoder_sparse_step"] != 1,
        "use_sliding_window": words["use_sliding_window"],
    }.items():
        refuse(feature, present)
    need(words, "num_experts_per_tok", "moe_intermediate_size")
    experts = words.get("num_experts") or words.get("num_local_experts")
    if experts is None:
        raise UnknownModel("config.json lacks num_experts")
    return MoEConfig(
        experts=experts,
        experts_per_token=words["num_experts_per_tok"],
        intermediate=words["moe_intermediate_size"],
        normalize=words["norm_topk_prob"],
        **shared,
    )


def read_qwen3_moe(words: Words) -> Words:
    """Fields of a Qwen 3 mixture-of-experts model."""
    return read_qwen3(words) | {"moe": _read_qwen_experts(words)}


def read_qwen2_moe(words: Words) -> Words:
    """Fields of a Qwen 2 mixture-of-experts model, with its shared expert."""
    need(words, "shared_expert_intermediate_size")
    moe = _read_qwen_experts(words, shared_intermediate=words["shared_expert_intermediate_size"], shared_gate=True)
    return read_qwen2(words) | {"biases": ("qkv",) if words["qkv_bias"] else (), "moe": moe}


def write_qwen_moe(config: ModelConfig) -> Words:
    """config.json of a Qwen 2 or 3 mixture-of-experts model."""
    moe = config.moe
    assert moe is not None
    words = write_llama(config) | expert_fields(config, "num_experts")
    return words | {
        "moe_intermediate_size": moe.intermediate,
        "shared_expert_intermediate_size": moe.shared_intermediate,
        "norm_topk_prob": moe.normalize,
        "qkv_bias": "qkv" in config.biases,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }
