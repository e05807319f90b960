"""Maps logical tensors to the tensors of a megatron-core GPTModel.

The layers of a model are one tensor [layers, …], and so are its experts [layers, experts, …], unless every layer has
names of its own. q, k and v are one matrix in which each group of key and value heads has its query heads, its key and
its value in this order; gate and up are one matrix, the whole gate first, whatever tensor degree saved it. The
vocabulary may end in rows of padding.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lockstep.model.config import ModelConfig, UnknownModel
from lockstep.model.weights.names import EMBEDDING, HEAD, NORM, POSITIONS


@dataclass(frozen=True)
class Place:
    """Where a logical tensor lies: row i of it is row start + i // run · period + i % run of the stored one."""

    key: str
    lead: tuple[int, ...] = ()
    """Its place on the stored tensor's leading dims: the layer, the expert."""
    start: int = 0
    run: int = 1
    period: int = 1

    def rows(self, first: int, stop: int) -> NDArray[np.int64]:
        """Stored rows, in rising order, of the logical rows [first, stop)."""
        i = np.arange(first, stop)
        return self.start + i // self.run * self.period + i % self.run


STORED_EMBEDDING = "embedding.word_embeddings.weight"
_OUTSIDE = {
    EMBEDDING: STORED_EMBEDDING,
    POSITIONS: "embedding.position_embeddings.weight",
    HEAD: "output_layer.weight",
    NORM: "decoder.final_layernorm.weight",
    NORM.replace("weight", "bias"): "decoder.final_layernorm.bias",
}
_BLOCK = {
    "self_attn.o_proj": "self_attention.linear_proj",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "mlp.down_proj": "mlp.linear_fc2",
    "mlp.gate": "mlp.router",
    "mlp.shared_expert.down_proj": "mlp.shared_experts.linear_fc2",
}
_NORMS = {
    "input_layernorm": ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    "post_attention_layernorm": ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
}
"""Norms have names of their own, or those of a part of the linear layer behind them: in dense models, the latter."""


def place(name: str, model: ModelConfig) -> Place:
    """Locate a logical tensor in a checkpoint whose layers are stacked.

    Raises:
        UnknownModel: for norms that a GPTModel does not have.
    """
    if model.norm_at != "before" or model.qk_norm == "width":
        raise UnknownModel(f"Megatron has no names for norm_at={model.norm_at!r} with qk_norm={model.qk_norm!r}")
    if name in _OUTSIDE:
        return Place(_OUTSIDE[name])
    _, _, layer, rest = name.split(".", 3)
    module, part = rest.rsplit(".", 1)
    found = _in_block(module, part, model)
    return replace(found, key=f"decoder.layers.{found.key}", lead=(int(layer), *found.lead))


def _in_block(module: str, part: str, model: ModelConfig) -> Place:
    if module == "mlp.shared_expert_gate":
        return Place(f"mlp.shared_experts.gate_{part}")
    if module in _NORMS:
        own, fused = _NORMS[module]
        return Place((own if model.moe and module != "input_layernorm" else fused) + part)
    if module in _BLOCK:
        return Place(f"{_BLOCK[module]}.{part}")
    owner, projection = module.rsplit(".", 1)
    if owner == "self_attn":
        return _in_qkv(projection, part, model)
    stored, _, expert = owner.replace("mlp.shared_expert", "mlp.shared_experts").partition(".experts.")
    lead = (int(expert),) if expert else ()
    stored += ".experts.experts" if expert else ""
    if projection == "down_proj":
        return Place(f"{stored}.linear_fc2.{part}", lead)
    return _in_fc1(f"{stored}.linear_fc1.{part}", lead, projection, _inner(owner, model), model.gated)


def _in_qkv(projection: str, part: str, model: ModelConfig) -> Place:
    queries = model.heads // model.kv_heads * model.head_dim
    start = {"q_proj": 0, "k_proj": queries, "v_proj": queries + model.head_dim}[projection]
    run = queries if projection == "q_proj" else model.head_dim
    return Place(f"self_attention.linear_qkv.{part}", (), start, run, queries + 2 * model.head_dim)


def _in_fc1(key: str, lead: tuple[int, ...], projection: str, inner: int, gated: bool) -> Place:
    return Place(key, lead, inner if gated and projection == "up_proj" else 0, inner, inner)


def _inner(owner: str, model: ModelConfig) -> int:
    if model.moe is None:
        return model.intermediate
    return model.moe.shared_intermediate if owner == "mlp.shared_expert" else model.moe.intermediate


def variants(found: Place) -> Iterator[Place]:
    """All forms in which Megatron may have stored a tensor: stacked, by layer, by expert, gate and up apart."""
    yield from _by_any_name(found)
    if not found.key.startswith("decoder.layers."):
        return
    layer, *expert = found.lead
    alone = replace(found, key=found.key.replace("layers.", f"layers.{layer}.", 1), lead=tuple(expert))
    yield from _by_any_name(alone)
    if expert:
        alone = replace(alone, key=alone.key.replace("experts.experts.", f"experts.experts.{expert[0]}."), lead=())
        yield alone
    yield replace(alone, key=f"{alone.key}_{'v' if alone.start else 'w'}", start=0)


def _by_any_name(found: Place) -> Iterator[Place]:
    yield found
    for other in other_names(found.key):
        yield replace(found, key=other)


def other_names(key: str) -> Iterator[str]:
    """Other names of a stored norm: layer specs differ in where they keep it."""
    for names in _NORMS.values():
        for one, other in (names, names[::-1]):
            if one in key:
                yield key.replace(one, other)


@dataclass(frozen=True)
class Part:
    """One layer's or expert's slice of a stored tensor, or a whole one that has no layers."""

    key: str
    lead: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the whole stored tensor, without padding."""
    tensors: tuple[tuple[str, Place, int], ...]
    """Logical tensors in it: names, places, rows."""

    @property
    def rows(self) -> int:
        """Number of rows of this part."""
        return self.shape[len(self.lead)]

    @property
    def is_vocabulary(self) -> bool:
        """Whether rows of padding may follow (embedding and head)."""
        return self.tensors[0][0] in (EMBEDDING, HEAD)


def parts(places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    """All parts that a checkpoint stores, in the order of the logical tensors."""
    grouped: dict[tuple[str, tuple[int, ...]], list[tuple[str, Place, int]]] = {}
    count: dict[str, tuple[int, ...]] = {}
    for name, found in places.items():
        grouped.setdefault((found.key, found.lead), []).append((name, found, shapes[name][0]))
        count[found.key] = tuple(i + 1 for i in found.lead)
    return [
        Part(key, lead, (*count[key], sum(rows for *_, rows in within), *shapes[within[0][0]][1:]), tuple(within))
        for (key, lead), within in grouped.items()
    ]


def extra_states(stored: Iterable[Part]) -> Iterator[str]:
    """Names of the `_extra_state` objects of a GPTModel, Transformer Engine's norms included; empty but for FP8."""
    for part in stored:
        module = part.key.rsplit(".", 1)[0]
        if module.endswith(_STATELESS):
            continue
        counts = part.shape[: len(part.lead)]
        place = f"{'.'.join(map(str, part.lead or (0,)))}_{'.'.join(map(str, counts or (1,)))}"
        yield f"{module}._extra_state/shard_{place}"
        if module.endswith("self_attention.linear_proj"):
            yield f"{module.removesuffix('linear_proj')}core_attention._extra_state/shard_{place}"


_STATELESS = ("_embeddings", "output_layer", "mlp.router", "mlp.shared_experts")
