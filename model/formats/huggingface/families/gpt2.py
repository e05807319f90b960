"""GPT-2: config.json to and from ModelConfig."""

from lockstep.model.config import ModelConfig, need, refuse
from lockstep.model.formats.huggingface.families.shared import activation_of
from lockstep.model.formats.huggingface.rope import Words


def read_gpt2(words: Words) -> Words:
    """Fields of a GPT-2 model."""
    need(words, "n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
    for feature in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        refuse(feature, words.get(feature))
    width, heads = words["n_embd"], words["n_head"]
    return {
        "layers": words["n_layer"],
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "intermediate": words["n_inner"] or 4 * width,
        "vocabulary": words["vocab_size"],
        "context": words["n_positions"],
        "activation": activation_of(words["activation_function"], "activation_function"),
        "gated": False,
        "biases": ("qkv", "out", "mlp"),
        "norm": "layer",
        "norm_eps": words["layer_norm_epsilon"],
        "query_scalar": None if words["scale_attn_weights"] else 1.0,
        "rope": None,
        "tied": words["tie_word_embeddings"],
    }


def write_gpt2(config: ModelConfig) -> Words:
    """config.json of a GPT-2 model."""
    return {
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.intermediate,
        "n_positions": config.context,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.query_scalar is None,
    }
