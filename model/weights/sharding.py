"""The slice map: which part of which logical tensor each local parameter holds, in any layout.

Saving, loading, import, export and weight sync all go through `parameter_pieces`.
"""

from collections.abc import Iterator
from dataclasses import replace

from lockstep.distributed.checkpoint.tensors import Piece, whole
from lockstep.model.config import ModelConfig
from lockstep.model.weights.names import LORA_A, LORA_B, NORMS, outside

OnAxis = tuple[int, int]
"""A rank on an axis, and the axis's degree."""


def parameter_pieces(
    path: str, model: ModelConfig, shapes: dict[str, tuple[int, ...]], tensor: OnAxis = (0, 1), expert: OnAxis = (0, 1)
) -> Iterator[Piece]:
    """The pieces of logical tensors in the parameter at this path of a `Transformer`.

    Args:
        shapes: the model's `logical_tensors`.
        tensor, expert: this rank and the degree on the tensor axis, and on the expert axis.

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
    """Whether the parameter at this path is a stack of experts' matrices."""
    return path.endswith((".mlp.gate_up", ".mlp.down"))


def _logical_names(path: str, model: ModelConfig) -> tuple[list[str], int | None]:
    """Logical tensors that lie one after the other in a parameter, and the dim that the tensor axis splits."""
    if ADAPTERS in path:
        return _adapter_name(path)
    if not path.endswith((".weight", ".bias")):
        path += ".weight"
    path, part = path.rsplit(".", 1)
    if not path.startswith("blocks."):
        name, split = outside(model)[path]
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
        **{norm: ([name], None) for norm, name in NORMS[model.norm_at].items()},
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
    """The vocabulary size, padded to a multiple of the tensor degree."""
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
