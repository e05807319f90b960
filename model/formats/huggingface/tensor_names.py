"""Maps logical tensors to the stored names of GPT-2 and Mixtral, which join, transpose or rename them."""

from collections.abc import Callable
from dataclasses import dataclass

from lockstep.model.config import ModelConfig, UnknownModel
from lockstep.model.weights.names import logical_tensors


@dataclass(frozen=True)
class Stored:
    """Name, orientation and part of the stored tensor that holds a logical tensor."""

    name: str
    transposed: bool = False
    part: int = 0
    """Which of `parts` equal parts along the stored tensor's last dim."""
    parts: int = 1

    def shape(self, logical: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor, from that of the logical one."""
        shape = logical[::-1] if self.transposed else logical
        return (*shape[:-1], shape[-1] * self.parts)


_GPT2_ENDS = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "score": "score",
}
_GPT2_BLOCK = {
    "input_layernorm": ("ln_1", 0, 1),
    "self_attn.q_proj": ("attn.c_attn", 0, 3),
    "self_attn.k_proj": ("attn.c_attn", 1, 3),
    "self_attn.v_proj": ("attn.c_attn", 2, 3),
    "self_attn.o_proj": ("attn.c_proj", 0, 1),
    "post_attention_layernorm": ("ln_2", 0, 1),
    "mlp.up_proj": ("mlp.c_fc", 0, 1),
    "mlp.down_proj": ("mlp.c_proj", 0, 1),
}


def _in_gpt2(name: str) -> Stored:
    name, kind = name.rsplit(".", 1)
    if name in _GPT2_ENDS:
        return Stored(f"{_GPT2_ENDS[name]}.{kind}")
    _, _, layer, place = name.split(".", 3)
    stored, part, parts = _GPT2_BLOCK[place]
    return Stored(f"transformer.h.{layer}.{stored}.{kind}", name.endswith("_proj") and kind == "weight", part, parts)


_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _in_mixtral(name: str) -> Stored:
    block, inside, place = name.partition(".mlp.")
    if not inside:
        return Stored(name)
    *experts, matrix, kind = place.split(".")
    return Stored(".".join([block, "block_sparse_moe", *experts, _MIXTRAL.get(matrix, matrix), kind]))


STORED: dict[str, Callable[[str], Stored]] = {"gpt2": _in_gpt2, "mixtral": _in_mixtral}
"""By family: where a logical tensor lies, for families that do not store it under its own name."""


def stored_names(model: ModelConfig) -> dict[str, str]:
    """The name in Hugging Face's files of each logical tensor, for families that store them as they are.

    Raises:
        UnknownModel: for a family that joins or transposes tensors.
    """
    places = {name: STORED.get(model.family, Stored)(name) for name in logical_tensors(model)}
    if any(place.transposed or place.parts > 1 for place in places.values()):
        raise UnknownModel(f"files of {model.family} join or transpose tensors, and here each is needed as it is")
    return {name: place.name for name, place in places.items()}
