"""Model families: Hugging Face's `config.json` read into a `ModelConfig` and written back, a pair of functions each.

What a file leaves out has the default of the family's class in `transformers`. Configurations are written in words
that versions 4 and 5 both read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.model.config import Head, ModelConfig, MoEConfig, UnknownModel, need, refuse
from lockstep.model.rope import Rope
from lockstep.model.rope_words import Words, rope_from, rope_words


@dataclass(frozen=True)
class Family:
    """How one `model_type` says what a `ModelConfig` is."""

    architecture: str
    read: Callable[[Words], Words]
    """`config.json` → fields of `ModelConfig`."""
    write: Callable[[ModelConfig], Words]
    classifier: str = ""
    """The class with one number in the place of logits, where its name does not follow from the architecture's."""

    def architecture_of(self, head: Head) -> str:
        """The class in `transformers` that has this head."""
        if head == "vocabulary":
            return self.architecture
        stem = self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return self.classifier or f"{stem}{CLASSIFIER}"


CLASSIFIER = "ForSequenceClassification"


def from_huggingface(words: Words) -> ModelConfig:
    """The model that a `config.json` describes.

    Raises:
        UnknownModel: for a family, or a feature, that the block lacks.
    """
    family = _family(words.get("model_type"))
    for feature in ("use_bidirectional_attention", "quantization_config"):
        refuse(feature, words.get(feature))
    eos = words.get("eos_token_id")
    is_classifier = any(name.endswith(CLASSIFIER) for name in words.get("architectures") or ())
    labels = words.get("num_labels") or len(words.get("id2label") or range(2))
    refuse(f"num_labels={labels}, where a value head has one,", is_classifier and labels != 1)
    fields = family.read(words) | ({"head": "value", "tied": False} if is_classifier else {})
    return ModelConfig(
        family=words["model_type"],
        bos_token=words.get("bos_token_id"),
        eos_tokens=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        **fields,
    )


def to_huggingface(config: ModelConfig, dtype: str) -> Words:
    """The `config.json` that `transformers` reads.

    Raises:
        UnknownModel: when the family has no words for some feature of this model.
    """
    family, eos = _family(config.family), list(config.eos_tokens)
    words = {
        "architectures": [family.architecture_of(config.head)],
        "model_type": config.family,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_token,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "dtype": dtype,
        **_LABELS[config.head],
    } | family.write(config)
    said, meant = from_huggingface(words), _without_losses(config)
    lost = [name for name in ModelConfig.model_fields if getattr(said, name) != getattr(meant, name)]
    if lost:
        raise UnknownModel(f"a config.json of model_type={config.family!r} cannot say this model's {', '.join(lost)}")
    return words


_LABELS: dict[Head, Words] = {
    "vocabulary": {},
    "value": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"},
}
"""What makes a classifier's answer one number without bounds."""


def _family(kind: str | None) -> Family:
    if kind not in FAMILIES:
        raise UnknownModel(f"model_type={kind!r} is not supported: use one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _without_losses(config: ModelConfig) -> ModelConfig:
    """The model without its routers' losses, which are a matter of training and have no words."""
    if config.moe is None:
        return config
    silent = config.moe.model_copy(update={"balance_coefficient": 0.0, "z_coefficient": 0.0})
    return config.model_copy(update={"moe": silent})


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_ACTIVATION_WORDS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def _activation(word: str, key: str) -> str:
    if word not in _ACTIVATIONS:
        raise UnknownModel(f"this checkpoint uses {key}={word}: supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[word]


def _read_llama(words: Words, *, tied: bool = False, theta: float = 10000.0) -> Words:
    """What Llama says, and the families that came after it say in the same words."""
    need(words, "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    need(words, "vocab_size", "max_position_embeddings", "rms_norm_eps")
    heads = words["num_attention_heads"]
    attention = ("qkv", "out") if words.get("attention_bias") else ()
    return {
        "layers": words["num_hidden_layers"],
        "width": words["hidden_size"],
        "heads": heads,
        "kv_heads": words.get("num_key_value_heads") or heads,
        "head_dim": words.get("head_dim") or words["hidden_size"] // heads,
        "intermediate": words["intermediate_size"],
        "vocabulary": words["vocab_size"],
        "context": words["max_position_embeddings"],
        "activation": _activation(words.get("hidden_act", "silu"), "hidden_act"),
        "biases": (*attention, *(("mlp",) if words.get("mlp_bias") else ())),
        "norm_eps": words["rms_norm_eps"],
        "rope": rope_from(words.get("rope_scaling") or words.get("rope_parameters") or {}, words, theta),
        "tied": words.get("tie_word_embeddings", tied),
    }


def _write_llama(config: ModelConfig) -> Words:
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": config.context,
        "hidden_act": _ACTIVATION_WORDS[config.activation],
        "attention_bias": "out" in config.biases,
        "mlp_bias": "mlp" in config.biases,
        "rms_norm_eps": config.norm_eps,
        **rope_words(config.rope),
    }


def _windows(window: int | None, types: Sequence[str]) -> Words:
    """Fields for layers of these types, in the words of `layer_types`."""
    for kind in types:
        refuse(f"layer_types={kind}", kind not in ("full_attention", "sliding_attention"))
    if window is None or "sliding_attention" not in types:
        return {}
    return {"window": window, "full_layers": tuple(i for i, kind in enumerate(types) if kind == "full_attention")}


def _layer_types(config: ModelConfig) -> list[str]:
    windows = (config.window_of(i) for i in range(config.layers))
    return ["full_attention" if w is None else "sliding_attention" for w in windows]


def _types(words: Words, is_full: Callable[[int], Any]) -> list[str]:
    """`layer_types`, or the family's rule."""
    layers = range(words["num_hidden_layers"])
    return words.get("layer_types") or ["full_attention" if is_full(i) else "sliding_attention" for i in layers]


def _read_mistral(words: Words) -> Words:
    window = words.get("sliding_window", 4096)
    return _read_llama(words) | {"biases": ()} | ({} if window is None else {"window": window})


def _write_mistral(config: ModelConfig) -> Words:
    return _write_llama(config) | {"sliding_window": config.window}


def _read_qwen2(words: Words) -> Words:
    window = words.get("sliding_window", 4096) if words.get("use_sliding_window") else None
    full = words.get("max_window_layers", 28)
    return _read_llama(words) | {"biases": ("qkv",)} | _windows(window, _types(words, lambda layer: layer < full))


def _write_qwen(config: ModelConfig) -> Words:
    types = _layer_types(config)
    return _write_llama(config) | {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": (*types, "sliding_attention").index("sliding_attention"),
        "layer_types": types,
    }


def _read_qwen3(words: Words) -> Words:
    biases = _read_llama(words | {"mlp_bias": False})["biases"]
    return _read_qwen2(words) | {"biases": biases, "qk_norm": "head"}


def _read_smollm3(words: Words) -> Words:
    fields = _read_llama(words, tied=True, theta=2_000_000.0)
    interval, layers = words.get("no_rope_layer_interval", 4), range(fields["layers"])
    rotated = words.get("no_rope_layers") or [(i + 1) % interval for i in layers]
    window = words.get("sliding_window") if words.get("use_sliding_window") else None
    return (
        fields
        | {"unrotated_layers": tuple(i for i in layers if not rotated[i])}
        | _windows(window, _types(words, lambda layer: rotated[layer]))
    )


def _write_smollm3(config: ModelConfig) -> Words:
    return _write_llama(config) | {
        "no_rope_layers": [int(config.rope_of(i) is not None) for i in range(config.layers)],
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": _layer_types(config),
    }


def _read_gemma(words: Words) -> Words:
    """The first files say `gelu` and mean its tanh approximation."""
    word = words.get("hidden_activation") or words.get("hidden_act") or "gelu_pytorch_tanh"
    word = "gelu_pytorch_tanh" if word == "gelu" else word
    return _read_llama(words | {"hidden_act": word, "mlp_bias": False}, tied=True) | {
        "norm": "rms_offset",
        "embedding_scale": words["hidden_size"] ** 0.5,
    }


def _write_gemma(config: ModelConfig) -> Words:
    words = _write_llama(config)
    return words | {"hidden_activation": words["hidden_act"]}


def _read_gemma2(words: Words) -> Words:
    types = _types(words, lambda layer: layer % 2)
    return (
        _read_gemma(words)
        | {
            "norm_at": "around",
            "query_scalar": words.get("query_pre_attn_scalar", 256),
            "attention_cap": words.get("attn_logit_softcapping", 50.0),
            "logit_cap": words.get("final_logit_softcapping", 30.0),
        }
        | _windows(words.get("sliding_window", 4096), types)
    )


def _write_gemma2(config: ModelConfig) -> Words:
    scalar = config.query_scalar or config.head_dim
    return _write_gemma(config) | {
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        "sliding_window": config.window or config.context,
        "layer_types": _layer_types(config),
    }


def _read_gemma3(words: Words) -> Words:
    refuse("attn_logit_softcapping", words.get("attn_logit_softcapping"))
    pattern = words.get("sliding_window_pattern", 6)
    types = _types(words, lambda layer: (layer + 1) % pattern == 0)
    nested = words.get("rope_parameters") or {}
    of_full = nested.get("full_attention") or words.get("rope_scaling") or {}
    of_window = nested.get("sliding_attention") or {"rope_theta": words.get("rope_local_base_freq")}
    fields = {
        **_read_gemma2(
            {"attn_logit_softcapping": None, "final_logit_softcapping": None} | words | {"layer_types": types}
        ),
        "qk_norm": "head",
        "rope": rope_from(of_full, words, 1_000_000.0),
    }
    if "window" in fields:
        fields["window_rope"] = rope_from(of_window, words | {"rope_theta": None}, 10_000.0)
    return fields


def _write_gemma3(config: ModelConfig) -> Words:
    local = config.window_rope or config.rope or Rope()
    return _write_gemma2(config) | {"rope_local_base_freq": local.theta}


def _read_olmo2(words: Words) -> Words:
    return _read_llama(words | {"mlp_bias": False}) | {"norm_at": "after", "qk_norm": "width"}


def _read_gpt2(words: Words) -> Words:
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
        "intermediate": words.get("n_inner") or 4 * width,
        "vocabulary": words["vocab_size"],
        "context": words["n_positions"],
        "activation": _activation(words.get("activation_function", "gelu_new"), "activation_function"),
        "gated": False,
        "biases": ("qkv", "out", "mlp"),
        "norm": "layer",
        "norm_eps": words.get("layer_norm_epsilon", 1e-5),
        "query_scalar": None if words.get("scale_attn_weights", True) else 1.0,
        "rope": None,
        "tied": words.get("tie_word_embeddings", True),
    }


def _write_gpt2(config: ModelConfig) -> Words:
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


def _read_mixtral(words: Words) -> Words:
    window = words.get("sliding_window")
    moe = MoEConfig(
        experts=words.get("num_local_experts", 8),
        experts_per_token=words.get("num_experts_per_tok", 2),
        intermediate=words["intermediate_size"],
    )
    fields = _read_llama(words, theta=1_000_000.0) | {"biases": (), "moe": moe}
    return fields | ({} if window is None else {"window": window})


def _write_mixtral(config: ModelConfig) -> Words:
    return _write_mistral(config) | _expert_words(config, "num_local_experts")


def _read_qwen_experts(words: Words, **shared: Any) -> MoEConfig:
    for feature, present in {
        "mlp_only_layers": words.get("mlp_only_layers"),
        "decoder_sparse_step": words.get("decoder_sparse_step", 1) != 1,
        "use_sliding_window": words.get("use_sliding_window"),
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
        normalize=words.get("norm_topk_prob", False),
        **shared,
    )


def _read_qwen3_moe(words: Words) -> Words:
    return _read_qwen3(words) | {"moe": _read_qwen_experts(words)}


def _read_qwen2_moe(words: Words) -> Words:
    need(words, "shared_expert_intermediate_size")
    moe = _read_qwen_experts(words, shared_intermediate=words["shared_expert_intermediate_size"], shared_gate=True)
    return _read_qwen2(words) | {"biases": ("qkv",) if words.get("qkv_bias", True) else (), "moe": moe}


def _write_qwen_moe(config: ModelConfig) -> Words:
    moe = config.moe
    assert moe is not None
    words = _write_llama(config) | _expert_words(config, "num_experts")
    return words | {
        "moe_intermediate_size": moe.intermediate,
        "shared_expert_intermediate_size": moe.shared_intermediate,
        "norm_topk_prob": moe.normalize,
        "qkv_bias": "qkv" in config.biases,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def _expert_words(config: ModelConfig, key: str) -> Words:
    assert config.moe is not None
    return {key: config.moe.experts, "num_experts_per_tok": config.moe.experts_per_token}


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _read_llama, _write_llama),
    "mistral": Family("MistralForCausalLM", _read_mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", _read_qwen3, _write_qwen),
    "smollm3": Family("SmolLM3ForCausalLM", _read_smollm3, _write_smollm3),
    "gemma": Family("GemmaForCausalLM", _read_gemma, _write_gemma),
    "gemma2": Family("Gemma2ForCausalLM", _read_gemma2, _write_gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", _read_gemma3, _write_gemma3, f"Gemma3Text{CLASSIFIER}"),
    "olmo2": Family("Olmo2ForCausalLM", _read_olmo2, _write_llama),
    "mixtral": Family("MixtralForCausalLM", _read_mixtral, _write_mixtral),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _read_qwen2_moe, _write_qwen_moe),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen_moe),
    "gpt2": Family("GPT2LMHeadModel", _read_gpt2, _write_gpt2),
}
"""By Hugging Face's `model_type`."""
