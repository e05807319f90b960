"""The slice map: which part of which logical tensor each local parameter holds.

Logical tensors have Hugging Face's names and unpadded shapes: q, k, v, gate and up apart, the vocabulary without
padding, a tied head recorded once. Everything that moves tensors goes through `pieces`.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from lockstep.distributed.checkpoint.spec import Box, Piece, Source, to_torch, whole
from lockstep.model.config import ModelConfig
from lockstep.model.transformer import Transformer, padded_vocabulary

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def logical_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every logical tensor of a model."""
    q, kv, width = model.heads * model.head_dim, model.kv_heads * model.head_dim, model.width
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocabulary, width)}
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (width,),
            prefix + "self_attn.q_proj.weight": (q, width),
            prefix + "self_attn.k_proj.weight": (kv, width),
            prefix + "self_attn.v_proj.weight": (kv, width),
            prefix + "self_attn.o_proj.weight": (width, q),
            prefix + "post_attention_layernorm.weight": (width,),
            prefix + "mlp.gate_proj.weight": (model.intermediate, width),
            prefix + "mlp.up_proj.weight": (model.intermediate, width),
            prefix + "mlp.down_proj.weight": (width, model.intermediate),
        }
    shapes[NORM] = (width,)
    return shapes if model.tied else shapes | {HEAD: (model.vocabulary, width)}


def pieces(transformer: Transformer) -> Iterator[tuple[nn.Parameter, Piece]]:
    """Every piece that this rank holds. Copies that another rank or stage owns have `owned=False`."""
    groups, shapes = transformer.groups, logical_tensors(transformer.model)
    replica, tensor, rank = groups.owns_replicated, groups.layout.tensor, groups.tensor_rank
    for path, parameter in transformer.named_parameters():
        names, split = _logical_names(path)
        offset = 0
        for name in names:
            shape = shapes[name]
            if split is None:
                yield parameter, _copy(name, shape, owned=replica and rank == 0)
                continue
            owned = replica and not (name == EMBEDDING and not groups.is_first_stage)
            part = _share(name, shape, split, tensor, rank, offset, owned)
            offset += part.tile[0]
            if part.box[split][0] < part.box[split][1]:
                yield parameter, part


def _logical_names(path: str) -> tuple[list[str], int | None]:
    """Logical tensors that lie one after the other in a parameter, and the dim that the tensor axis splits."""
    if not path.startswith("blocks."):
        names = {"embedding.weight": EMBEDDING, "head.weight": HEAD, "norm.weight": NORM}
        return [names[path]], None if path == "norm.weight" else 0
    _, layer, rest = path.split(".", 2)
    inside, split = {
        "attention_norm.weight": (["input_layernorm"], None),
        "attention.qkv.weight": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], 0),
        "attention.out.weight": (["self_attn.o_proj"], 1),
        "mlp_norm.weight": (["post_attention_layernorm"], None),
        "mlp.gate_up.weight": (["mlp.gate_proj", "mlp.up_proj"], 0),
        "mlp.down.weight": (["mlp.down_proj"], 1),
    }[rest]
    return [f"model.layers.{layer}.{name}.weight" for name in inside], split


def _copy(name: str, shape: tuple[int, ...], owned: bool) -> Piece:
    return Piece(name, shape, whole(shape), whole(shape), shape, owned)


def _share(name: str, shape: tuple[int, ...], split: int, tensor: int, rank: int, offset: int, owned: bool) -> Piece:
    """This rank's part along `split`; in the parameter it starts at row `offset` (only dim 0 is ever shared)."""
    size = padded_vocabulary(shape[split], tensor) // tensor
    start, stop = min(rank * size, shape[split]), min((rank + 1) * size, shape[split])
    box: list[tuple[int, int]] = [(0, n) for n in shape]
    local = list(box)
    box[split] = (start, stop)
    local[split] = (offset, offset + stop - start)
    tile = list(shape)
    tile[split] = size
    return Piece(name, shape, tuple(box), tuple(local), tuple(tile), owned)


@torch.no_grad()
def load(transformer: Transformer, source: Source) -> None:
    """Fill every parameter of this rank from a source, which may have been written in any layout; padding becomes 0."""
    for parameter, piece in pieces(transformer):
        if piece.name in (EMBEDDING, HEAD):
            parameter[piece.local[0][1] :] = 0
        piece.view(parameter).copy_(to_torch(source.read(piece.name, piece.box)))


class RandomWeights:
    """Weights drawn for training from scratch: each logical tensor from (seed, its name), so the same in any layout."""

    def __init__(self, model: ModelConfig, seed: int, deviation: float = 0.02) -> None:
        self._shapes, self._seed, self._deviation = logical_tensors(model), seed, deviation

    def read(self, name: str, box: Box) -> np.ndarray:
        """See `Source`. Matrices are normal with the given standard deviation, scales are 1."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return np.ones([b - a for a, b in box], np.float32)
        generator = np.random.default_rng([self._seed, *name.encode()])
        drawn = generator.standard_normal(shape, dtype=np.float32) * np.float32(self._deviation)
        return drawn[tuple(slice(a, b) for a, b in box)]
