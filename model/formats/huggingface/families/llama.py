"""Llama, Mistral, Mixtral, SmolLM 3 and OLMo 2: config.json to and from ModelConfig."""

from lockstep.model.config import ModelConfig, MoEConfig, UnknownModel, need
from lockstep.model.formats.huggingface.families.shared import (
    ACTIVATION_WORDS,
    activation_of,
    expert_fields,
    layer_types,
    layer_types_of,
    window_fields,
)
from lockstep.model.formats.huggingface.rope import Words, rope_from, rope_words


def read_llama(words: Words) -> Words:
    """Fields of a Llama model, and those that later families share with it."""
    need(words, "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    need(words, "vocab_size", "max_position_embeddings", "rms_norm_eps")
    heads = words["num_attention_heads"]
    attention = ("qkv", "out") if words["attention_bias"] else ()
    return {
        "layers": words["num_hidden_layers"],
        "width": words["hidden_size"],
        "heads": heads,
        "kv_heads": words["num_key_value_heads"] or heads,
        "head_dim": words["head_dim"] or words["hidden_size"] // heads,
        "intermediate": words["intermediate_size"],
        "vocabulary": words["vocab_size"],
        "context": words["max_position_embeddings"],
        "activation": activation_of(words["hidden_act"], "hidden_act"),
        "biases": (*attention, *(("mlp",) if words["mlp_bias"] else ())),
        "norm_eps": words["rms_norm_eps"],
        "rope": rope_from(words.get("rope_scaling") or words.get("rope_parameters") or {}, words),
        "tied": words["tie_word_embeddings"],
    }


def write_llama(config: ModelConfig) -> Words:
    """config.json of a Llama model, which later families extend."""
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": config.context,
        "hidden_act": ACTIVATION_WORDS[config.activation],
        "attention_bias": "out" in config.biases,
        "mlp_bias": "mlp" in config.biases,
        "rms_norm_eps": config.norm_eps,
        **rope_words(config.rope),
    }


def read_mistral(words: Words) -> Words:
    """Fields of a Mistral model."""
    window = words["sliding_window"]
    return read_llama(words) | {"biases": ()} | ({} if window is None else {"window": window})


def write_mistral(config: ModelConfig) -> Words:
    """config.json of a Mistral model."""
    return write_llama(config) | {"sliding_window": config.window}


def read_smollm3(words: Words) -> Words:
    """Fields of a SmolLM 3 model: layers without rotary positions, and sliding windows."""
    fields = read_llama(words)
    interval, layers = words["no_rope_layer_interval"], range(fields["layers"])
    rotated = words.get("no_rope_layers") or [(i + 1) % interval for i in layers]
    if len(rotated) < len(layers):
        raise UnknownModel(f"config.json describes no model: no_rope_layers has {len(rotated)} of {len(layers)} layers")
    window = words["sliding_window"] if words["use_sliding_window"] else None
    return (
        fields
        | {"unrotated_layers": tuple(i for i in layers if not rotated[i])}
        | window_fields(window, layer_types_of(words, lambda layer: rotated[layer]))
    )


def write_smollm3(config: ModelConfig) -> Words:
    """config.json of a SmolLM 3 model."""
    return write_llama(config) | {
        "no_rope_layers": [int(config.rope_of(i) is not None) for i in range(config.layers)],
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": layer_types(config),
    }


def read_olmo2(words: Words) -> Words:
    """Fields of an OLMo 2 model: norms after each sub-layer, and of whole query and key rows."""
    return read_llama(words | {"mlp_bias": False}) | {"norm_at": "after", "qk_norm": "width"}


def read_mixtral(words: Words) -> Words:
    """Fields of a Mixtral model."""
    fields = read_mistral(words)
    moe = MoEConfig(
        experts=words["num_local_experts"],
        experts_per_token=words["num_experts_per_tok"],
        intermediate=fields["intermediate"],
    )
    return fields | {"moe": moe}


def write_mixtral(config: ModelConfig) -> Words:
    """config.json of a Mixtral model."""
    return write_mistral(config) | expert_fields(config, "num_local_experts")
