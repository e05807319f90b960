"""Gemma 1, 2 and 3: config.json to and from ModelConfig."""

from lockstep.model.config import ModelConfig, refuse
from lockstep.model.formats.huggingface.families.llama import read_llama, write_llama
from lockstep.model.formats.huggingface.families.shared import layer_types, layer_types_of, window_fields
from lockstep.model.formats.huggingface.rope import Words, rope_from
from lockstep.model.rope import Rope


def read_gemma(words: Words) -> Words:
    """Fields of a Gemma 1 model. Its first config.json files say `gelu` and mean the tanh approximation."""
    word = "gelu_pytorch_tanh" if words["hidden_act"] == "gelu" else words["hidden_act"]
    return _read_gemma(words, word)


def _read_gemma(words: Words, activation: str) -> Words:
    """Fields that all versions share."""
    return read_llama(words | {"hidden_act": activation, "mlp_bias": False}) | {
        "norm": "rms_offset",
        "embedding_scale": words["hidden_size"] ** 0.5,
    }


def write_gemma(config: ModelConfig) -> Words:
    """config.json of a Gemma 1 model."""
    words = write_llama(config)
    return words | {"hidden_activation": words["hidden_act"]}


def read_gemma2(words: Words) -> Words:
    """Fields of a Gemma 2 model."""
    types = layer_types_of(words, lambda layer: layer % 2)
    return (
        _read_gemma(words, words["hidden_activation"])
        | {
            "norm_at": "around",
            "query_scalar": words["query_pre_attn_scalar"],
            "attention_cap": words["attn_logit_softcapping"],
            "logit_cap": words["final_logit_softcapping"],
        }
        | window_fields(words["sliding_window"], types)
    )


def write_gemma2(config: ModelConfig) -> Words:
    """config.json of a Gemma 2 model."""
    scalar = config.query_scalar or config.head_dim
    return write_gemma(config) | {
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        "sliding_window": config.window or config.context,
        "layer_types": layer_types(config),
    }


def read_gemma3(words: Words) -> Words:
    """Fields of a Gemma 3 text model."""
    refuse("attn_logit_softcapping", words["attn_logit_softcapping"])
    pattern = words["sliding_window_pattern"]
    types = layer_types_of(words, lambda layer: (layer + 1) % pattern == 0)
    nested = words.get("rope_parameters") or {}
    of_full = nested.get("full_attention") or words.get("rope_scaling") or {}
    of_window = nested.get("sliding_attention") or {}
    fields = {
        **read_gemma2(words | {"layer_types": types}),
        "qk_norm": "head",
        "rope": rope_from(of_full, words),
    }
    if "window" in fields:
        fields["window_rope"] = rope_from(of_window, words | {"rope_theta": words["rope_local_base_freq"]})
    return fields


def write_gemma3(config: ModelConfig) -> Words:
    """config.json of a Gemma 3 text model."""
    local = config.window_rope or config.rope or Rope()
    return write_gemma2(config) | {"rope_local_base_freq": local.theta}
