"""Keys of `config.json`: what a file that leaves one out means in each family, and the kinds of their values.

Defaults are those of the classes of `transformers` 5. Sizes of a model have none here: a file without them is refused.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lockstep.model.config import MOST_LAYERS, UnknownModel
from lockstep.model.formats.huggingface.rope import Words

_LLAMA: Words = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN2: Words = _LLAMA | {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS: Words = {"decoder_sparse_step": 1, "norm_topk_prob": False}
_GEMMA: Words = _LLAMA | {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_GEMMA2: Words = _GEMMA | {
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}

DEFAULTS: dict[str, Words] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "smollm3": _LLAMA
    | {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    },
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2
    | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
    "olmo2": _LLAMA | {"bos_token_id": None, "eos_token_id": 50_279},
    "mixtral": _LLAMA
    | {
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "rope_theta": 1_000_000.0,
    },
    "qwen2_moe": _QWEN2 | _EXPERTS | {"num_key_value_heads": 16, "qkv_bias": True},
    "qwen3_moe": _QWEN2 | _EXPERTS | {"num_key_value_heads": 4},
    "gpt2": {
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    },
}
"""By `model_type`: the values of keys that a file may leave out."""

_NULL = {"num_key_value_heads", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
"""Keys whose null says something else than their default."""

_LARGEST = 1 << 62


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.fabs(value) < math.inf


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    f"a whole number from 1 to {MOST_LAYERS}": (
        lambda value: _is_whole(value, 1) and value <= MOST_LAYERS,
        "num_hidden_layers n_layer",
    ),
    "a whole number above 0": (
        lambda value: _is_whole(value, 1),
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings no_rope_layer_interval sliding_window_pattern decoder_sparse_step num_local_experts "
        "num_experts num_experts_per_tok moe_intermediate_size num_labels "
        "n_embd n_head n_positions n_inner",
    ),
    "a whole number": (
        lambda value: _is_whole(value, 0),
        "sliding_window max_window_layers shared_expert_intermediate_size",
    ),
    "a token": (lambda value: _is_whole(value, -1), "bos_token_id"),
    "a finite number": (
        _is_number,
        "rope_theta rope_local_base_freq rms_norm_eps layer_norm_epsilon query_pre_attn_scalar attn_logit_softcapping "
        "final_logit_softcapping partial_rotary_factor factor low_freq_factor high_freq_factor beta_fast beta_slow "
        "attention_factor mscale mscale_all_dim original_max_position_embeddings",
    ),
    "true or false": (
        lambda value: isinstance(value, bool),
        "attention_bias mlp_bias qkv_bias tie_word_embeddings use_sliding_window norm_topk_prob scale_attn_weights "
        "truncate",
    ),
    "a text": (
        lambda value: isinstance(value, str) and value.isprintable(),
        "model_type hidden_act hidden_activation activation_function rope_type type",
    ),
    "a list of texts": (
        lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
        "architectures layer_types",
    ),
    "a list of numbers": (
        lambda value: isinstance(value, list) and all(isinstance(each, int) for each in value),
        "no_rope_layers mlp_only_layers",
    ),
    "a token or a list of tokens": (
        lambda value: all(_is_whole(each, -1) for each in (value if isinstance(value, list) else [value])),
        "eos_token_id",
    ),
    "an object": (
        lambda value: isinstance(value, dict),
        "rope_scaling rope_parameters full_attention sliding_attention id2label",
    ),
}
_KIND_OF = {key: (test, kind) for kind, (test, keys) in _KINDS.items() for key in keys.split()}


def completed(words: Words) -> Words:
    """A `config.json` with what its family's class in `transformers` gives to keys that it leaves out.

    Raises:
        UnknownModel: when a value is of another kind than its key's.
    """
    defaults = DEFAULTS[words["model_type"]]
    for key, value in words.items():
        is_null = value is None and (defaults.get(key) is None or key in _NULL or key.endswith("_token_id"))
        if not is_null:
            check_kind(key, value)
    return defaults | words


def check_kind(key: str, value: Any) -> None:
    """Raise unless a value of `config.json` is of the kind that its key has, and those inside of it are, too.

    Raises:
        UnknownModel: says key, value and kind.
    """
    if key in _KIND_OF and not _KIND_OF[key][0](value):
        raise UnknownModel(
            f"config.json describes no model: {key} is {str(value)[:40]!r}, and {_KIND_OF[key][1]} was needed"
        )
    if key in ("rope_scaling", "rope_parameters", "full_attention", "sliding_attention"):
        assert isinstance(value, Mapping)
        for inner, given in value.items():
            if given is not None:
                check_kind(inner, given)
