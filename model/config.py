"""The shape of a transformer, read from and written to the words of a Hugging Face `config.json`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class UnknownModel(ValueError):
    """A model that Lockstep's block does not describe."""


class ModelConfig(BaseModel):
    """A decoder-only transformer of the Llama family."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    intermediate: int = Field(ge=1)
    vocabulary: int = Field(ge=2)
    context: int = Field(ge=1, description="longest sequence, in tokens")
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied head is counted once."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        block = attention + 3 * self.width * self.intermediate + 2 * self.width
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.width
        return self.layers * block + embeddings + self.width


_NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def from_huggingface(config: dict[str, Any]) -> ModelConfig:
    """A `config.json` of Llama's architecture.

    Raises:
        UnknownModel: for another architecture, or a feature that the block lacks.
    """
    kind = config.get("model_type")
    if kind != "llama":
        raise UnknownModel(f"model_type={kind!r} is not supported: use a checkpoint whose model_type is 'llama'")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    lacking = {
        "rope scaling": scaling != "default",
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        f"hidden_act={config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
    }
    for feature, present in lacking.items():
        if present:
            raise UnknownModel(f"this checkpoint uses {feature}, which is not supported")
    missing = [name for name in _NEEDED if name not in config]
    if missing:
        raise UnknownModel(f"config.json lacks {', '.join(missing)}")
    heads = config["num_attention_heads"]
    eos = config.get("eos_token_id")
    return ModelConfig(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        rope_theta=config.get("rope_theta") or rope.get("rope_theta", 10000.0),
        norm_eps=config["rms_norm_eps"],
        tied=config.get("tie_word_embeddings", False),
        bos_token=config.get("bos_token_id"),
        eos_tokens=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    )


def to_huggingface(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that `transformers` reads."""
    eos = list(config.eos_tokens)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
