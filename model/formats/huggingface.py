"""Hugging Face folders: safetensors with an index, `config.json`, tokenizer files beside them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lockstep.distributed.checkpoint.spec import Box, to_numpy
from lockstep.model.config import ModelConfig, from_huggingface, to_huggingface

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class BadFolder(ValueError):
    """A folder that is not a whole Hugging Face checkpoint."""


class HuggingFaceFolder:
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

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        part: Tensor = self._files[name].get_slice(name)[tuple(slice(a, b) for a, b in box)]
        return to_numpy(part)

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
    state = {name: tensor.contiguous() for name, tensor in tensors}
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_huggingface(config, dtype), indent=2))
    for name, text in tokenizer.items():
        (folder / name).write_text(text)


def read_tokenizer(folder: Path) -> dict[str, str]:
    """Text of the tokenizer's files that the folder has."""
    return {name: (folder / name).read_text() for name in TOKENIZER_FILES if (folder / name).is_file()}
