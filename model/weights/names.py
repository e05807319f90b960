"""Names and shapes of the logical tensors of a model, which every layout and every format shares.

Logical tensors have the names of Hugging Face's Llama files and unpadded shapes: q, k, v, gate and up apart, the
vocabulary without padding, a tied head recorded once. What Llama lacks has the name that most families give it
(`mlp.up_proj` alone without a gate, `self_attn.q_norm`, `model.embed_positions`); the norms of a block are named as
Gemma 2 and OLMo 2 do. The slice map
(`sharding.py`) says which part of them a parameter holds; files with other names are translated where they are read and
written.
"""

import math

from lockstep.model.config import ModelConfig, MoEConfig

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
VALUE = "score.weight"
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
"""Replace a projection's `weight` in the names of its adapter's matrices, as in PEFT."""
POSITIONS = "model.embed_positions.weight"

_OUTSIDE = {
    "embedding": ("model.embed_tokens", 0),
    "positions": ("model.embed_positions", None),
    "norm": ("model.norm", None),
    "head": ("lm_head", 0),
}
"""Modules outside of blocks: their logical names, and the dim that tensor parallelism splits; see `outside`, too."""

NORMS = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {"attention_after": "post_attention_layernorm", "mlp_after": "post_feedforward_layernorm"},
    "around": {
        "attention_norm": "input_layernorm",
        "attention_after": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_after": "post_feedforward_layernorm",
    },
}
"""Logical names of a block's norms, by `norm_at`."""


def logical_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every logical tensor of a model."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocabulary, model.width)}
    if model.rope is None:
        shapes[POSITIONS] = (model.context, model.width)
    block = _block_tensors(model)
    for layer in range(model.layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= _norm_tensors(model, NORM.removesuffix(".weight"))
    head = VALUE if model.head == "value" else HEAD
    return shapes | ({head: (model.head_rows, model.width)} if model.head_rows else {})


def outside(model: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """Modules outside of blocks with logical names and split dims; a value head is replicated over tensor ranks."""
    return _OUTSIDE | ({"head": (VALUE.removesuffix(".weight"), None)} if model.head == "value" else {})


def _block_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    q, kv, width = model.heads * model.head_dim, model.kv_heads * model.head_dim, model.width
    linear = {
        "self_attn.q_proj": (q, width, "qkv"),
        "self_attn.k_proj": (kv, width, "qkv"),
        "self_attn.v_proj": (kv, width, "qkv"),
        "self_attn.o_proj": (width, q, "out"),
    }
    if model.moe is None:
        linear |= {
            "mlp.gate_proj": (model.intermediate, width, "mlp"),
            "mlp.up_proj": (model.intermediate, width, "mlp"),
            "mlp.down_proj": (width, model.intermediate, "mlp"),
        }
        if not model.gated:
            del linear["mlp.gate_proj"]
    shapes: dict[str, tuple[int, ...]] = expert_tensors(model.moe, width) if model.moe else {}
    for name, (outputs, inputs, kind) in linear.items():
        shapes[f"{name}.weight"] = (outputs, inputs)
        if kind in model.biases:
            shapes[f"{name}.bias"] = (outputs,)
        if model.lora and name.split(".")[-1] in model.adapted:
            shapes[f"{name}.{LORA_A}"] = (model.lora.rank, inputs)
            shapes[f"{name}.{LORA_B}"] = (outputs, model.lora.rank)
    if model.qk_norm is not None:
        one = model.qk_norm == "head"
        shapes["self_attn.q_norm.weight"] = (model.head_dim if one else q,)
        shapes["self_attn.k_norm.weight"] = (model.head_dim if one else kv,)
    for name in NORMS[model.norm_at].values():
        shapes |= _norm_tensors(model, name)
    return shapes


def expert_tensors(moe: MoEConfig, width: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a block's router and experts, named as in Qwen's files."""
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (moe.experts, width)}
    inner = {f"mlp.experts.{expert}": moe.intermediate for expert in range(moe.experts)}
    if moe.shared_intermediate:
        inner["mlp.shared_expert"] = moe.shared_intermediate
    for expert, rows in inner.items():
        shapes |= {f"{expert}.{name}.weight": (rows, width) for name in ("gate_proj", "up_proj")}
        shapes[f"{expert}.down_proj.weight"] = (width, rows)
    if moe.shared_gate:
        shapes["mlp.shared_expert_gate.weight"] = (1, width)
    return shapes


def _norm_tensors(model: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias") if model.norm == "layer" else ("weight",)
    return {f"{name}.{part}": (model.width,) for part in parts}


def part_sizes(model: ModelConfig) -> dict[str, int]:
    """Number of elements of each part of a model: `embedding`, learned `positions`, `layers.0`, …, `norm`, `head`."""
    part_of = {logical: part for part, (logical, _) in outside(model).items()}
    sizes: dict[str, int] = {}
    for name, shape in logical_tensors(model).items():
        module = name.removeprefix("model.").split(".")
        part = ".".join(module[:2]) if module[0] == "layers" else part_of[name.rsplit(".", 1)[0]]
        sizes[part] = sizes.get(part, 0) + math.prod(shape)
    return sizes


def is_adapter(name: str) -> bool:
    """Whether a logical tensor is a matrix of an adapter."""
    return name.endswith((f".{LORA_A}", f".{LORA_B}"))


def is_projection(name: str) -> bool:
    """Whether a logical tensor is a matrix of attention, of a feed-forward layer or of an expert; routers are not."""
    return name.endswith("_proj.weight")
