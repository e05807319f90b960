"""Reads and writes PEFT adapters: `adapter_config.json` and `adapter_model.safetensors`, beside a base model elsewhere.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. A tensor's name there is `base_model.model.` and
ours. What PEFT can do beyond plain LoRA of linear layers is refused.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.tensors import Box, Source, WeightsOnly, digest
from lockstep.model.config import LoraConfig, ModelConfig, Projection, UnknownModel, refuse
from lockstep.model.formats.files.extents import write_bytes
from lockstep.model.formats.files.safetensors import layout, read_header
from lockstep.model.formats.huggingface.reader import BadFolder
from lockstep.model.formats.huggingface.tensor_names import STORED
from lockstep.model.formats.recast import Recast
from lockstep.model.formats.target import LARGEST_PART, Part, split
from lockstep.model.weights.names import VALUE, is_adapter, logical_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_PLAIN = ("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "fan_in_fan_out", "lora_bias")
"""What must be empty or false."""


class PeftFolder:
    """LoRA adapters in a folder, to be applied to a base model."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            BadFolder: when a file is missing or damaged.
            UnknownModel: when the adapters are of another kind.
        """
        self.folder, words = folder, _words(folder)
        refuse(f"peft_type={words.get('peft_type')}", words.get("peft_type") != "LORA")
        refuse(f"bias={words.get('bias')!r}", words.get("bias", "none") != "none")
        for feature in _PLAIN:
            refuse(feature, words.get(feature))
        self.base: str | None = words.get("base_model_name_or_path")
        """The model that they belong to, by path or name."""
        self._extents = {name.removeprefix(PREFIX): extent for name, extent in read_header(folder / WEIGHTS).items()}
        targets = {name.split(".")[-3] for name in self._extents if is_adapter(name)}
        refuse(f"adapters of {', '.join(sorted(targets - {*get_args(Projection)}))}", targets - {*get_args(Projection)})
        self.lora = LoraConfig(
            rank=words["r"],
            alpha=words.get("lora_alpha", 8),
            rslora=words.get("use_rslora", False),
            targets=tuple(name for name in get_args(Projection) if name in targets),
        )

    def over(self, model: ModelConfig, source: Source) -> tuple[ModelConfig, Source]:
        """The base model's configuration and source with these adapters added.

        Raises:
            BadFolder: when a tensor that the model asks for is missing, has another shape, or is none of the model's.
        """
        head = "value" if VALUE in self._extents else model.head
        wanted = ModelConfig(**model.with_head(head).model_dump() | {"lora": self.lora.model_dump()})
        shapes = logical_tensors(wanted)
        for name in [name for name in shapes if is_adapter(name)]:
            found = self._extents[name].shape if name in self._extents else None
            if found != shapes[name]:
                raise BadFolder(f"{self.folder} has {name} of shape {found}, and its model asks for {shapes[name]}")
        if self._extents.keys() - shapes:
            raise BadFolder(f"{self.folder} has {min(self._extents.keys() - shapes)}, which its model does not have")
        return wanted, _Over(self, source)

    def read(self, name: str, box: Box) -> NDArray[Any] | None:
        """Read a box of a tensor that the folder has; None where it has not."""
        return self._extents[name].read(box) if name in self._extents else None


class _Over(WeightsOnly):
    """A `Source` of adapters and of their base model."""

    def __init__(self, adapters: PeftFolder, source: Source) -> None:
        self._adapters, self._source = adapters, source

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        found = self._adapters.read(name, box)
        return self._source.read(name, box) if found is None else found


class PeftTarget:
    """A folder that `PeftModel.from_pretrained` reads, as a `Target`: adapters, and a value head where there is one."""

    def __init__(
        self, folder: Path, model: ModelConfig, source: Recast, base: str, *, limit: int = LARGEST_PART
    ) -> None:
        """
        Args:
            base: path or name of the model that the adapters are for.
            limit: bytes of a part at most.

        Raises:
            UnknownModel: when a family's files store projections in another way.
        """
        if model.lora is None:
            raise UnknownModel("this model has no adapters: give a checkpoint of a run with trainer.trainable.lora")
        refuse(f"model_type={model.family!r}, whose files join projections,", model.family in STORED and not model.moe)
        self._folder, self._model, self._source, self._base = folder, model, source, base
        shapes = {n: shape for n, shape in logical_tensors(model).items() if is_adapter(n) or n == VALUE}
        stored = {PREFIX + name: (shape, source.dtype_of(name)) for name, shape in shapes.items()}
        self._header, self._extents = layout(folder / WEIGHTS, stored)
        self.parts: Sequence[Part] = [
            part for name, e in self._extents.items() for part in split(name, e.shape, e.dtype.itemsize, limit)
        ]

    def create(self) -> None:
        """See `Target`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        size = sum(extent.size for extent in self._extents.values())
        with open(self._folder / WEIGHTS, "ab") as opened:
            os.posix_fallocate(opened.fileno(), 0, len(self._header) + size)
        write_bytes(self._folder / WEIGHTS, 0, np.frombuffer(self._header, np.uint8))

    def write(self, part: Part) -> str:
        """See `Target`."""
        extent = self._extents[part.tensor]
        box = ((part.start, part.stop), *((0, n) for n in extent.shape[1:]))
        rows = np.ascontiguousarray(self._source.read(part.tensor.removeprefix(PREFIX), box))
        extent.write(part.start, rows)
        return digest(rows)

    def finish(self, digests: Mapping[Part, str]) -> None:
        """See `Target`."""
        (self._folder / CONFIG).write_text(json.dumps(_config(self._model, self._base), indent=2))


def _config(model: ModelConfig, base: str) -> dict[str, Any]:
    lora = model.lora
    assert lora is not None
    is_value = model.head == "value"
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_value else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == math.floor(lora.alpha) else lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": [*model.adapted],
        "modules_to_save": ["score"] if is_value else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _words(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise BadFolder(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("r"), int):
        raise BadFolder(f"{folder / CONFIG} does not say the rank r of its adapters")
    if not (folder / WEIGHTS).is_file():
        raise BadFolder(f"{folder} lacks {WEIGHTS}")
    return found
