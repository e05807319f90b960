"""Megatron-LM's arguments to and from ModelConfig.

A checkpoint of Megatron-LM keeps its command line as a namespace; the words are those of megatron/training/arguments.py
and, where those of `TransformerConfig` differ, either is read.
"""

from collections.abc import Mapping
from typing import Any

from lockstep.model.config import ModelConfig, MoEConfig, UnknownModel, refuse
from lockstep.model.formats.huggingface.families.registry import to_huggingface
from lockstep.model.rope import LinearScaling, Llama3Scaling, Rope

Words = Mapping[str, Any]

_REFUSED = (
    "multi_latent_attention",
    "mtp_num_layers",
    "squared_relu",
    "quick_geglu",
    "rotary_interleaved",
    "window_size",
    "no_rope_freq",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_latent_size",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "linear_attention_freq",
)
"""Arguments that mean another model than the block's where they are set."""


def from_megatron(words: Words, rows: int) -> ModelConfig:
    """Read Megatron-LM's arguments as a `ModelConfig`.

    Args:
        rows: of the stored embedding, which is the vocabulary where the arguments do not say it.

    Raises:
        UnknownModel: for a feature that the block lacks, or an argument that is missing.
    """
    for feature in _REFUSED:
        refuse(feature, words.get(feature))
    for word, usual in {
        "rotary_percent": 1.0,
        "softmax_type": "vanilla",
        "moe_router_score_function": "softmax",
    }.items():
        refuse(f"{word}={words.get(word)}", words.get(word, usual) != usual)
    width, heads = _need(words, "hidden_size"), _need(words, "num_attention_heads")
    experts = words.get("num_experts") or words.get("num_moe_experts")
    fields = {
        "layers": _need(words, "num_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": (words.get("group_query_attention", True) and words.get("num_query_groups")) or heads,
        "head_dim": words.get("kv_channels") or width // heads,
        "intermediate": words.get("ffn_hidden_size") or 4 * width,
        "vocabulary": words.get("vocab_size") or rows,
        "context": words.get("max_position_embeddings") or _need(words, "seq_length"),
        "biases": _biases(words),
        "norm": _norm(words),
        "norm_eps": _either(words, "norm_epsilon", "layernorm_epsilon", 1e-5),
        "qk_norm": "head" if words.get("qk_layernorm") else None,
        "rope": _rope(words),
        "tied": not words.get("untie_embeddings_and_output_weights"),
        "moe": _moe(words, experts) if experts else None,
        **_activation(words),
    }
    return _named(ModelConfig(**fields))


def to_megatron(model: ModelConfig) -> dict[str, Any]:
    """Write a `ModelConfig` as Megatron-LM's arguments.

    Raises:
        UnknownModel: when there are none for some feature of this model.
    """
    words = {
        "num_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "group_query_attention": model.kv_heads != model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.intermediate,
        "vocab_size": model.vocabulary,
        "padded_vocab_size": model.vocabulary,
        "max_position_embeddings": model.context,
        "seq_length": model.context,
        "normalization": "LayerNorm" if model.norm == "layer" else "RMSNorm",
        "apply_layernorm_1p": model.norm == "rms_offset",
        "norm_epsilon": model.norm_eps,
        "swiglu": model.gated and model.activation == "silu",
        "bias_gelu_fusion": model.activation == "gelu_tanh",
        "add_bias_linear": "mlp" in model.biases,
        "add_qkv_bias": "qkv" in model.biases,
        "qk_layernorm": model.qk_norm == "head",
        "untie_embeddings_and_output_weights": not model.tied,
        **_rope_words(model.rope),
        **(_moe_words(model.moe) if model.moe else {"num_experts": None}),
    }
    said, meant = from_megatron(words, model.vocabulary), _without_losses(model)
    lost = [name for name in _SAID if getattr(said, name) != getattr(meant, name)]
    if lost:
        raise UnknownModel(f"Megatron's arguments cannot say this model's {', '.join(lost)}")
    return words


_SAID = tuple(name for name in ModelConfig.model_fields if name not in ("family", "bos_token", "eos_tokens"))


def _without_losses(model: ModelConfig) -> ModelConfig:
    """The model without its routers' losses, which are a matter of training."""
    if model.moe is None:
        return model
    silent = model.moe.model_copy(update={"balance_coefficient": 0.0, "z_coefficient": 0.0})
    return model.model_copy(update={"moe": silent})


def _named(model: ModelConfig) -> ModelConfig:
    """The model under the first family whose words can say it, so that it can be exported."""
    dense = ("gpt2",) if model.rope is None else ("llama", "qwen2", "qwen3", "gemma")
    sparse = ("qwen2_moe",) if model.moe and model.moe.shared_gate else ("mixtral", "qwen3_moe")
    for family in sparse if model.moe else dense:
        named = model.model_copy(update={"family": family})
        try:
            to_huggingface(named, "float32")
        except UnknownModel:
            continue
        return named
    return model


def _need(words: Words, name: str) -> Any:
    if words.get(name) is None:
        raise UnknownModel(f"the checkpoint's arguments lack {name}: put the model's config.json beside it")
    return words[name]


def _either(words: Words, name: str, other: str, default: Any) -> Any:
    return words.get(name, words.get(other, default))


def _norm(words: Words) -> str:
    kind, offset = (
        words.get("normalization", "LayerNorm"),
        _either(words, "apply_layernorm_1p", "layernorm_zero_centered_gamma", False),
    )
    refuse(f"normalization={kind}", kind not in ("LayerNorm", "RMSNorm"))
    refuse("apply_layernorm_1p with LayerNorm", offset and kind == "LayerNorm")
    return "layer" if kind == "LayerNorm" else "rms_offset" if offset else "rms"


def _biases(words: Words) -> tuple[str, ...]:
    if words.get("add_bias_linear", True):
        return ("qkv", "out", "mlp")
    return ("qkv",) if words.get("add_qkv_bias") else ()


def _activation(words: Words) -> dict[str, Any]:
    """Megatron's fused GELU with a bias is the tanh approximation, its plain one is not."""
    if _either(words, "swiglu", "gated_linear_unit", False):
        return {"activation": "silu", "gated": True}
    tanh = words.get("openai_gelu") or _either(words, "bias_gelu_fusion", "bias_activation_fusion", False)
    return {"activation": "gelu_tanh" if tanh else "gelu", "gated": False}


def _rope(words: Words) -> Rope | None:
    kind = "rope" if words.get("use_rotary_position_embeddings") else words.get("position_embedding_type")
    if kind == "learned_absolute":
        return None
    refuse(f"position_embedding_type={kind}", kind != "rope")
    scaling: Any = None
    if words.get("use_rope_scaling"):
        scaling = Llama3Scaling(factor=words.get("rope_scaling_factor", 8.0), original_context=8192)
    elif words.get("rotary_seq_len_interpolation_factor"):
        scaling = LinearScaling(factor=words["rotary_seq_len_interpolation_factor"])
    return Rope(theta=words.get("rotary_base", 10000), scaling=scaling)


def _rope_words(rope: Rope | None) -> dict[str, Any]:
    if rope is None:
        return {"position_embedding_type": "learned_absolute", "add_position_embedding": True}
    words: dict[str, Any] = {"position_embedding_type": "rope", "add_position_embedding": True}
    words |= {"rotary_base": rope.theta, "rotary_percent": 1.0}
    if isinstance(rope.scaling, Llama3Scaling):
        words |= {"use_rope_scaling": True, "rope_scaling_factor": rope.scaling.factor}
    if isinstance(rope.scaling, LinearScaling):
        words["rotary_seq_len_interpolation_factor"] = rope.scaling.factor
    return words


def _moe(words: Words, experts: int) -> MoEConfig:
    frequency = words.get("moe_layer_freq", 1)
    refuse(f"moe_layer_freq={frequency}", frequency != 1 and set(_listed(frequency)) != {1})
    shared = words.get("moe_shared_expert_intermediate_size") or 0
    return MoEConfig(
        experts=experts,
        experts_per_token=words.get("moe_router_topk", 2),
        intermediate=words.get("moe_ffn_hidden_size") or _need(words, "ffn_hidden_size"),
        shared_intermediate=shared,
        shared_gate=bool(shared and words.get("moe_shared_expert_gate")),
        normalize=not words.get("moe_router_pre_softmax"),
    )


def _listed(frequency: Any) -> list[Any]:
    return list(frequency) if isinstance(frequency, list | tuple) else [frequency]


def _moe_words(moe: MoEConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.experts,
        "moe_router_topk": moe.experts_per_token,
        "moe_ffn_hidden_size": moe.intermediate,
        "moe_shared_expert_intermediate_size": moe.shared_intermediate or None,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_router_pre_softmax": not moe.normalize,
        "moe_layer_freq": 1,
    }
