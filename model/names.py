"""The slice map: which part of which logical tensor each local parameter holds, in any layout.

Logical tensors have the names of Hugging Face's Llama files and unpadded shapes: q, k, v, gate and up apart, the
vocabulary without padding, a tied head recorded once. What Llama lacks has the name that most families give it
(`mlp.up_proj` alone without a gate, `self_attn.q_norm`, `model.embed_positions`); the norms of a block are named as
Gemma 2 and OLMo 2 do. Everything that moves tensors goes through `parameter_pieces`; families whose files say other
words are translated where those are read and written.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lockstep.distributed.checkpoint.tensors import Box, Piece, WeightsOnly, whole
from lockstep.model.config import ModelConfig, MoEConfig

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
VALUE = "score.weight"
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
"""What stands in the place of a projection's `weight` in the names of its adapter's matrices, as PEFT calls them."""
POSITIONS = "model.embed_positions.weight"

OnAxis = tuple[int, int]
"""A rank on an axis, and the axis's degree."""

_OUTSIDE = {
    "embedding": ("model.embed_tokens", 0),
    "positions": ("model.embed_positions", None),
    "norm": ("model.norm", None),
    "head": ("lm_head", 0),
}
"""Modules outside of blocks: their logical names, and the dim that the tensor axis splits; see `_outside`, too."""

_NORMS = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {"attention_after": "post_attention_layernorm", "mlp_after": "post_feedforward_layernorm"},
    "around": {
        "attention_norm": "input_layernorm",
        "attention_after": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_after": "post_feedforward_layernorm",
    },
}
"""By `norm_at`: logical names of a block's norms."""


def logical_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every logical tensor of a model."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocabulary, model.width)}
    if model.rope is None:
        shapes[POSITIONS] = (model.context, model.width)
    block = _block_tensors(model)
    for layer in range(model.layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= _norm_tensors(model, NORM.removesuffix(".weight"))
    head = VALUE if model.head == "value" else HEAD
    return shapes | ({head: (model.head_rows, model.width)} if model.head_rows else {})


def _outside(model: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """`_OUTSIDE` for the head that a model has; all tensor ranks hold the whole of a value head."""
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
    for name in _NORMS[model.norm_at].values():
        shapes |= _norm_tensors(model, name)
    return shapes


def expert_tensors(moe: MoEConfig, width: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors of a block's router and experts, as Qwen's files name them."""
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
    """Elements of each part of a model: `embedding`, `positions` where learned, `layers.0`, …, `norm`, `head`."""
    part_of = {logical: part for part, (logical, _) in _outside(model).items()}
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


def parameter_pieces(
    path: str, model: ModelConfig, shapes: dict[str, tuple[int, ...]], tensor: OnAxis = (0, 1), expert: OnAxis = (0, 1)
) -> Iterator[Piece]:
    """The pieces in the parameter of this path in a `Transformer`.

    Args:
        shapes: the model's `logical_tensors`.
        tensor: whose parameter it is, on the tensor axis; and on the expert axis.

    Raises:
        KeyError: when a `Transformer` of this model has no such parameter.
    """
    if is_stack(path):
        yield from _expert_pieces(path, shapes, tensor, expert)
        return
    names, split = _logical_names(path, model)
    offset = 0
    for name in names:
        shape = shapes[name]
        if split is None:
            yield Piece(name, shape, whole(shape), whole(shape), shape, first=tensor[0] == 0)
            continue
        part = _share(name, shape, split, tensor, offset)
        offset += part.tile[0]
        if part.box[split][0] < part.box[split][1]:
            yield part


def is_stack(path: str) -> bool:
    """Whether a parameter is a stack of experts' matrices."""
    return path.endswith((".mlp.gate_up", ".mlp.down"))


def _logical_names(path: str, model: ModelConfig) -> tuple[list[str], int | None]:
    """Logical tensors that lie one after the other in a parameter, and the dim that the tensor axis splits."""
    if ADAPTERS in path:
        return _adapter_name(path)
    if not path.endswith((".weight", ".bias")):
        path += ".weight"
    path, part = path.rsplit(".", 1)
    if not path.startswith("blocks."):
        name, split = _outside(model)[path]
        return [f"{name}.{part}"], split
    _, layer, place = path.split(".", 2)
    qk_split = 0 if model.qk_norm == "width" else None
    within: dict[str, tuple[list[str], int | None]] = {
        "attention.qkv": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], 0),
        "attention.qk_norm.q": (["self_attn.q_norm"], qk_split),
        "attention.qk_norm.k": (["self_attn.k_norm"], qk_split),
        "attention.out": (["self_attn.o_proj"], 1 if part == "weight" else None),
        "mlp.gate_up": (["mlp.gate_proj", "mlp.up_proj"], 0),
        "mlp.up": (["mlp.up_proj"], 0),
        "mlp.down": (["mlp.down_proj"], 1 if part == "weight" else None),
        "mlp.router": (["mlp.gate"], None),
        "mlp.shared.gate_up": (["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"], 0),
        "mlp.shared.down": (["mlp.shared_expert.down_proj"], 1),
        "mlp.shared.gate": (["mlp.shared_expert_gate"], None),
        **{norm: ([name], None) for norm, name in _NORMS[model.norm_at].items()},
    }
    names, split = within[place]
    return [f"model.layers.{layer}.{name}.{part}" for name in names], split


ADAPTERS = ".adapters."
"""In the path of a parameter of an adapter."""


def _adapter_name(path: str) -> tuple[list[str], int | None]:
    """The one logical tensor in an adapter's parameter: the dim that its layer's weight is split on is split, too."""
    _, layer, part, module, _, projection, matrix = path.split(".")
    by_rows = module not in ("out", "down")
    home, split = {"attention": "self_attn"}.get(part, part), {"a": None, "b": 0} if by_rows else {"a": 1, "b": None}
    name = f"model.layers.{layer}.{home}.{projection}"
    return [f"{name}.{LORA_A if matrix == 'a' else LORA_B}"], split[matrix]


def _expert_pieces(path: str, shapes: dict[str, tuple[int, ...]], tensor: OnAxis, expert: OnAxis) -> Iterator[Piece]:
    """Pieces of a stack [local experts, …] of matrices; ranks of the expert axis hold consecutive experts."""
    _, layer, _, kind = path.split(".")
    names, split = (["gate_proj", "up_proj"], 0) if kind == "gate_up" else (["down_proj"], 1)
    experts, _ = shapes[f"model.layers.{layer}.mlp.gate.weight"]
    rank, degree = expert
    local = experts // degree
    for place in range(local):
        offset = 0
        for kind in names:
            name = f"model.layers.{layer}.mlp.experts.{rank * local + place}.{kind}.weight"
            part = _share(name, shapes[name], split, tensor, offset)
            offset += part.tile[0]
            yield replace(part, local=((place, place + 1), *part.local))


def padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """The vocabulary with rows of padding, so that it divides by the tensor degree."""
    return -(-vocabulary // tensor) * tensor


def _share(name: str, shape: tuple[int, ...], split: int, tensor: OnAxis, offset: int) -> Piece:
    """A tensor rank's part along `split`; in the parameter it starts at row `offset` (only dim 0 is ever shared)."""
    rank, degree = tensor
    size = padded_vocabulary(shape[split], degree) // degree
    start, stop = min(rank * size, shape[split]), min((rank + 1) * size, shape[split])
    box: list[tuple[int, int]] = [(0, n) for n in shape]
    local = list(box)
    box[split] = (start, stop)
    local[split] = (offset, offset + stop - start)
    tile = list(shape)
    tile[split] = size
    return Piece(name, shape, tuple(box), tuple(local), tuple(tile))


class RandomWeights(WeightsOnly):
    """Weights drawn for training from scratch: each logical tensor from (seed, its name), so the same in any layout."""

    def __init__(self, model: ModelConfig, seed: int, deviation: float = 0.02) -> None:
        self._shapes, self._seed, self._deviation = logical_tensors(model), seed, deviation
        self._scale = 0 if model.norm == "rms_offset" else 1

    def read(self, name: str, box: Box) -> np.ndarray:
        """See `Source`. Matrices are normal with the given standard deviation, norms scale by 1, biases are 0."""
        shape = self._shapes[name]
        if len(shape) == 1:
            value = 0 if name.endswith(".bias") else self._scale
            return np.full([b - a for a, b in box], value, np.float32)
        generator = np.random.default_rng([self._seed, *name.encode()])
        drawn = generator.standard_normal(shape, dtype=np.float32) * np.float32(self._deviation)
        return drawn[tuple(slice(a, b) for a, b in box)]
