"""Hugging Face folders: safetensors with an index, `config.json`, tokenizer files beside them.

Files name their tensors as `model/names.py` does, except GPT-2's and Mixtral's. In GPT-2's, q, k and v are one tensor,
linear layers are stored as [inputs, outputs], and blocks are called `transformer.h` (or `h`, in files of the bare
model); Mixtral's have words of their own for experts.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lockstep.distributed.checkpoint.spec import Box, WeightsOnly, to_numpy
from lockstep.model.config import ModelConfig
from lockstep.model.families import from_huggingface, to_huggingface

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class BadFolder(ValueError):
    """A folder that is not a whole Hugging Face checkpoint."""


@dataclass(frozen=True)
class Stored:
    """Where a logical tensor lies in a file."""

    name: str
    transposed: bool = False
    part: int = 0
    """Which of `parts` equal parts along the stored tensor's last dim."""
    parts: int = 1


_GPT2_ENDS = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
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


class HuggingFaceFolder(WeightsOnly):
    """A `Source` over a folder of safetensors; slices are read from disk one by one."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            BadFolder: when config.json or a file of weights is missing.
        """
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise BadFolder(f"{folder} has no config.json: give a folder that save_pretrained wrote")
        self.config: ModelConfig = from_huggingface(json.loads((folder / "config.json").read_text()))
        self._files = {name: self._open(file) for name, file in self._locations().items()}
        self._stored = STORED.get(self.config.family, Stored)

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        stored = self._stored(name)
        name = stored.name if stored.name in self._files else stored.name.removeprefix("transformer.")
        held = self._files[name].get_slice(name)
        place = [slice(a, b) for a, b in (box[::-1] if stored.transposed else box)]
        if stored.parts > 1:
            first = stored.part * (held.get_shape()[-1] // stored.parts)
            place[-1] = slice(first + place[-1].start, first + place[-1].stop)
        part: Tensor = held[tuple(place)]
        return to_numpy(part.t() if stored.transposed else part)

    def _locations(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return json.loads(index.read_text())["weight_map"]
        with self._open("model.safetensors") as file:
            return dict.fromkeys(file.keys(), "model.safetensors")

    def _open(self, name: str) -> Any:
        if not (self.folder / name).is_file():
            raise BadFolder(f"{self.folder} lacks {name}")
        return safe_open(self.folder / name, "pt")


def write(folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], tokenizer: dict[str, str]) -> None:
    """Write a folder that `from_pretrained` reads.

    Args:
        tokenizer: file name → text of the tokenizer's files.
    """
    folder.mkdir(parents=True)
    state = _joined(tensors, STORED.get(config.family, Stored))
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_huggingface(config, dtype), indent=2))
    for name, text in tokenizer.items():
        (folder / name).write_text(text)


def _joined(tensors: Iterable[tuple[str, Tensor]], stored: Callable[[str], Stored]) -> dict[str, Tensor]:
    """Logical tensors as a file stores them."""
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        place = stored(name)
        parts[place.name][place.part] = tensor.t() if place.transposed else tensor
    return {
        name: (held[0] if len(held) == 1 else torch.cat([held[i] for i in sorted(held)], dim=-1)).contiguous()
        for name, held in parts.items()
    }


def read_tokenizer(folder: Path) -> dict[str, str]:
    """Text of the tokenizer's files that the folder has."""
    return {name: (folder / name).read_text() for name in TOKENIZER_FILES if (folder / name).is_file()}
