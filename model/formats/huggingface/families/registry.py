"""The registry of model families: each reads Hugging Face's `config.json` into a `ModelConfig` and writes it back.

What a file leaves out has the default of the family's class in `transformers`. Configurations are written in words
that versions 4 and 5 both read.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lockstep.model.config import Head, ModelConfig, UnknownModel, refuse
from lockstep.model.formats.files.reading import reading
from lockstep.model.formats.huggingface.families.config_keys import completed
from lockstep.model.formats.huggingface.families.gemma import (
    read_gemma,
    read_gemma2,
    read_gemma3,
    write_gemma,
    write_gemma2,
    write_gemma3,
)
from lockstep.model.formats.huggingface.families.gpt2 import read_gpt2, write_gpt2
from lockstep.model.formats.huggingface.families.llama import (
    read_llama,
    read_mistral,
    read_mixtral,
    read_olmo2,
    read_smollm3,
    write_llama,
    write_mistral,
    write_mixtral,
    write_smollm3,
)
from lockstep.model.formats.huggingface.families.qwen import (
    read_qwen2,
    read_qwen2_moe,
    read_qwen3,
    read_qwen3_moe,
    write_qwen,
    write_qwen_moe,
)
from lockstep.model.formats.huggingface.rope import Words


@dataclass(frozen=True)
class Family:
    """How one `model_type` of config.json is read and written."""

    architecture: str
    read: Callable[[Words], Words]
    """`config.json` → fields of `ModelConfig`."""
    write: Callable[[ModelConfig], Words]
    classifier: str = ""
    """The class with one number in the place of logits, where its name does not follow from the architecture's."""

    def architecture_of(self, head: Head) -> str:
        """The class in `transformers` for this family with this head."""
        if head == "vocabulary":
            return self.architecture
        stem = self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        return self.classifier or f"{stem}{CLASSIFIER}"


CLASSIFIER = "ForSequenceClassification"


def from_huggingface(words: Words) -> ModelConfig:
    """Read a `config.json` as a `ModelConfig`.

    Raises:
        UnknownModel: for a family, or a feature, that the block lacks.
        BadFile: for values that describe no model.
    """
    with reading("config.json", "describes no model"):
        return _model_of(words)


def _model_of(words: Words) -> ModelConfig:
    family = _family(words.get("model_type"))
    words = completed(words)
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
    """Write a `ModelConfig` as the `config.json` that `transformers` reads.

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


FAMILIES = {
    "llama": Family("LlamaForCausalLM", read_llama, write_llama),
    "mistral": Family("MistralForCausalLM", read_mistral, write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", read_qwen2, write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", read_qwen3, write_qwen),
    "smollm3": Family("SmolLM3ForCausalLM", read_smollm3, write_smollm3),
    "gemma": Family("GemmaForCausalLM", read_gemma, write_gemma),
    "gemma2": Family("Gemma2ForCausalLM", read_gemma2, write_gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", read_gemma3, write_gemma3, f"Gemma3Text{CLASSIFIER}"),
    "olmo2": Family("Olmo2ForCausalLM", read_olmo2, write_llama),
    "mixtral": Family("MixtralForCausalLM", read_mixtral, write_mixtral),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", read_qwen2_moe, write_qwen_moe),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", read_qwen3_moe, write_qwen_moe),
    "gpt2": Family("GPT2LMHeadModel", read_gpt2, write_gpt2),
}
"""By Hugging Face's `model_type`."""
