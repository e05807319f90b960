"""What a `config.json` leaves out means what `transformers` takes it for, key by key, in every family."""

import json
from typing import Any

import pytest
from transformers import AutoConfig

from lockstep.model.config import ModelConfig, UnknownModel
from lockstep.model.formats.huggingface.families.config_keys import DEFAULTS
from lockstep.model.formats.huggingface.families.registry import FAMILIES, from_huggingface

SIZES = {
    "vocab_size": 101,
    "hidden_size": 960,
    "intermediate_size": 72,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-4,
}
GPT2_SIZES = {"vocab_size": 101, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128}
EXPERT_SIZES = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
SAID: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 48,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "silu",
    "attention_bias": True,
    "mlp_bias": True,
    "rope_theta": 1234.0,
    "rope_local_base_freq": 555.0,
    "sliding_window": 9,
    "max_window_layers": 3,
    "no_rope_layer_interval": 3,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 99,
    "attn_logit_softcapping": 7.0,
    "final_logit_softcapping": 8.0,
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
    "n_inner": 60,
    "activation_function": "gelu",
    "layer_norm_epsilon": 1e-3,
    "scale_attn_weights": False,
    "num_local_experts": 4,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "qkv_bias": False,
}
"""Values that are no family's default."""


def sizes(family: str) -> dict[str, Any]:
    found = GPT2_SIZES if family == "gpt2" else SIZES
    if family in ("qwen2_moe", "qwen3_moe"):
        found = found | EXPERT_SIZES | ({"shared_expert_intermediate_size": 50} if family == "qwen2_moe" else {})
    return {"model_type": family} | found


def said(family: str) -> dict[str, Any]:
    """A file that says everything, none of it as the class would."""
    defaults = DEFAULTS[family]
    words = {key: value for key, value in SAID.items() if key in defaults}
    words["tie_word_embeddings"] = not defaults["tie_word_embeddings"]
    if "use_sliding_window" in defaults and not family.endswith("moe"):
        words["use_sliding_window"] = True
    if family == "gemma3_text":
        words["attn_logit_softcapping"] = None
    if family.startswith("qwen3"):
        words["hidden_act"] = "silu" if family.endswith("moe") else words["hidden_act"]
    if family in ("mixtral", "qwen2_moe"):
        words["hidden_act"] = "silu"
    if family.endswith("moe"):
        words["mlp_bias"] = False
    return sizes(family) | words


def by_transformers(words: dict[str, Any]) -> ModelConfig:
    """Read after `transformers` has put its defaults into it."""
    given = {key: value for key, value in json.loads(json.dumps(words)).items() if key != "model_type"}
    full = json.loads(AutoConfig.for_model(words["model_type"], **given).to_json_string(use_diff=False))
    for key in ("head_dim", "rope_scaling", "attention_bias", "mlp_bias"):  # no class's, or not under this name
        full.setdefault(key, words.get(key))
        if full[key] is None:
            del full[key]
    return from_huggingface(full)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_with_nothing_but_sizes_is_read_as_transformers_reads_it(family: str) -> None:
    words = sizes(family)
    assert from_huggingface(words) == by_transformers(words)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_key_may_be_absent(family: str) -> None:
    words = said(family)
    everything = from_huggingface(words)
    assert everything == by_transformers(words)
    for key in words.keys() & DEFAULTS[family].keys():
        less = {name: value for name, value in words.items() if name != key}
        assert from_huggingface(less) == by_transformers(less), key


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_classes(family: str) -> None:
    config = AutoConfig.for_model(family)
    for key, value in DEFAULTS[family].items():
        if hasattr(config, key) and value is not None:
            derived = key == "sliding_window" and not getattr(config, "use_sliding_window", True)
            assert derived or getattr(config, key) == value, key


@pytest.mark.parametrize(
    ("words", "head_dim"),
    [
        ({"model_type": "gemma3_text", "hidden_size": 3840, "num_attention_heads": 16, "num_key_value_heads": 8}, 256),
        ({"model_type": "gemma2", "hidden_size": 4608, "num_attention_heads": 32, "num_key_value_heads": 16}, 256),
        ({"model_type": "gemma", "hidden_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 1}, 256),
        ({"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}, 128),
        ({"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}, 64),
        ({"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32, "head_dim": None}, 64),
        ({"model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32, "head_dim": None}, 128),
        ({"model_type": "olmo2", "hidden_size": 2048, "num_attention_heads": 16}, 128),
    ],
)
def test_the_width_of_a_head_where_it_is_absent(words: dict[str, Any], head_dim: int) -> None:
    assert from_huggingface(SIZES | words).head_dim == head_dim


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_never_made_up(family: str) -> None:
    with pytest.raises(UnknownModel, match=r"config\.json lacks "):
        from_huggingface({"model_type": family})
    for key in sizes(family).keys() - {"model_type", "num_experts_per_tok"} - DEFAULTS[family].keys():
        with pytest.raises(UnknownModel, match=f"config.json lacks .*{key}"):
            from_huggingface({name: value for name, value in sizes(family).items() if name != key})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two', and a whole number from 1 to 10000 was needed"),
        ({"num_hidden_layers": 2**60}, "num_hidden_layers is "),
        ({"hidden_size": 48.0}, "hidden_size is '48.0', and a whole number above 0 was needed"),
        ({"hidden_size": True}, "hidden_size is "),
        ({"hidden_size": 2**60}, "width: Input should be less than"),
        ({"vocab_size": 10**400}, "vocab_size is "),
        ({"vocab_size": 2**60}, "more than 1e"),
        ({"num_attention_heads": 0}, "num_attention_heads is '0'"),
        ({"head_dim": None, "model_type": "qwen3"}, "head_dim is 'None'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is 'nan', and a finite number was needed"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', and an object was needed"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "describes no model: factor"),
        ({"layer_types": "full_attention", "model_type": "qwen3"}, "layer_types is 'full_attention', and a list"),
        ({"layer_types": ["full_attention"], "model_type": "qwen3"}, "layer_types has 1 of 8 layers"),
        ({"no_rope_layers": [1, 0], "model_type": "smollm3"}, "no_rope_layers has 2 of 8 layers"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', and true or false was needed"),
        ({"eos_token_id": [0, "x"]}, "eos_token_id is "),
        ({"architectures": [3]}, "architectures is "),
        ({"model_type": ["llama"]}, "describes no model"),
    ],
)
def test_values_of_another_kind_are_one_sentence(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as raised:
        from_huggingface(SIZES | {"model_type": "llama"} | change)
    assert "\n" not in str(raised.value)
