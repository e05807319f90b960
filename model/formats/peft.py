"""Reads and writes PEFT adapters: `adapter_config.json` and `adapter_model.safetensors`, beside a base model elsewhere.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. A tensor's name there is `base_model.model.` and
ours. What PEFT can do beyond plain LoRA of linear layers is refused by name, and so is what is not known here: a key
that a later version adds may mean another model.
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
from lockstep.model.formats.files.reading import read_object, reading
from lockstep.model.formats.files.safetensors import layout, read_header
from lockstep.model.formats.huggingface.reader import BadFolder
from lockstep.model.formats.huggingface.tensor_names import STORED
from lockstep.model.formats.recast import Recast
from lockstep.model.formats.target import LARGEST_PART, Part, split
from lockstep.model.weights.names import VALUE, is_adapter, logical_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version"),
    *("r", "lora_alpha", "use_rslora", "bias", "init_lora_weights", "revision"),  # read below
    *("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"),  # shown by the tensors
    *("lora_dropout", "runtime_config", "ephemeral_gpu_offload", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # say how the initialization went
}
"""Keys of adapter_config.json that change no model, or that are taken into account; others must be empty or false."""

_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model's weights alone.

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take their part out of them first, and PEFT does so again when it loads adapters.
"""


class PeftFolder:
    """LoRA adapters in a folder, to be applied to a base model."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            BadFolder: when a file is missing or damaged.
            UnknownModel: when the adapters are of another kind.
        """
        self.folder, words = folder, _words(folder)
        _check_plain(words)
        self.base: str | None = words.get("base_model_name_or_path")
        """The model that they belong to, by path or name."""
        self._extents = {name.removeprefix(PREFIX): extent for name, extent in read_header(folder / WEIGHTS).items()}
        with reading(folder / CONFIG):
            self.lora = self._lora(words)

    def _lora(self, words: dict[str, Any]) -> LoraConfig:
        targets = {name.split(".")[-3] for name in self._extents if is_adapter(name)}
        refuse(f"adapters of {', '.join(sorted(targets - {*get_args(Projection)}))}", targets - {*get_args(Projection)})
        return LoraConfig(
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
        with reading(self.folder, "does not fit the model that it names"):
            wanted = ModelConfig(**model.with_head(head).model_dump() | {"lora": self.lora.model_dump()})
        shapes = logical_tensors(wanted)
        whole = {name for name in self._extents if not is_adapter(name)} - {VALUE}
        refuse(f"modules_to_save, {min(whole, default='')} over a base model with a tied head,", whole and model.tied)
        for name in [name for name in shapes if is_adapter(name) or name in self._extents]:
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
    found = read_object(folder / CONFIG)
    if not isinstance(found.get("r"), int):
        raise BadFolder(f"{folder / CONFIG} does not say the rank r of its adapters")
    if not isinstance(found.get("base_model_name_or_path"), str | None):
        raise BadFolder(f"{folder / CONFIG} has a base_model_name_or_path that is no text")
    if not (folder / WEIGHTS).is_file():
        raise BadFolder(f"{folder} lacks {WEIGHTS}")
    return found


def _check_plain(words: dict[str, Any]) -> None:
    """Refuse by name whatever makes another model of base and adapters than W + scale · B · A.

    Raises:
        UnknownModel: when there is something.
    """
    refuse(f"peft_type={words.get('peft_type')}", words.get("peft_type") != "LORA")
    refuse(f"bias={words.get('bias')!r}", words.get("bias", "none") != "none")
    begun, revision = words.get("init_lora_weights", True), words.get("revision")
    if not isinstance(begun, bool | str | None) or begun not in _UNCHANGED:
        raise UnknownModel(
            f"this checkpoint uses init_lora_weights={begun!r}, whose base model is not the one that it names: save it "
            "with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…), which makes plain LoRA of it"
        )
    refuse(f"revision={revision!r} of its base model", revision not in (None, "main"))
    for feature in sorted(words.keys() - _HARMLESS):
        refuse(feature, words[feature])
