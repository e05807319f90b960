"""Describes a checkpoint, or what a conversion would write, from names and shapes alone."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.cluster.conversion.memory import in_words
from lockstep.cluster.conversion.plan import Conversion, chosen, target_of
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.tensors import STATES, Box, Source, WeightsOnly
from lockstep.model.config import ModelConfig
from lockstep.model.formats.huggingface import reader
from lockstep.model.formats.recast import DTYPES, Recast
from lockstep.model.formats.registry import TARGETS, BadSource, OpenModel, locate, recognise


class ConfigurationAlone(WeightsOnly):
    """A `Source` for a model that has a configuration and no weights yet: it knows dtypes, and cannot be read."""

    def __init__(self, dtype: str) -> None:
        self._dtype = DTYPES[dtype]

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """An empty array of the dtype, for an empty box."""
        assert any(start == stop for start, stop in box)
        return np.empty([stop - start for start, stop in box], self._dtype)


def open_outline(name: str) -> OpenModel:
    """Open a model as `open_model` does, or a Hugging Face folder that has a config.json and no weights yet.

    Raises:
        BadSource: says what was given and what can be given.
    """
    location = locate(name)
    known = recognise(location)
    if not isinstance(location, Path) or known.name != "hf" or reader.has_weights(location):
        return known.open(location)
    words = reader.read_words(location)
    dtype = words.get("dtype") or words.get("torch_dtype") or "float32"
    source = ConfigurationAlone(dtype if isinstance(dtype, str) and dtype in DTYPES else "float32")
    return OpenModel(source, reader.read_config(location), reader.read_text_files(location), location, known)


def check_has_weights(opened: OpenModel) -> None:
    """Refuse an outline, which can be described and not converted.

    Raises:
        BadSource: where there is a configuration and no weights.
    """
    if isinstance(opened.source, ConfigurationAlone):
        raise BadSource(f"{opened.location} lacks model.safetensors, and has no other file of weights")


def plan_lines(conversion: Conversion, opened: OpenModel) -> Iterator[str]:
    """What a conversion of an opened model will do, a sentence a line."""
    source, model = chosen(conversion, opened), opened.config
    target, recast = target_of(conversion, opened, Path())
    form, sizes = TARGETS[conversion.to], [part.size for part in target.parts]
    yield f"{conversion.source}: {opened.format.title}, {_shape(model)}"
    yield f"{conversion.destination}: {form.title}, {in_words(sum(sizes))}, {_dtypes(recast)}"
    merges = model.lora is not None and form.adapters == "merged"
    yield _of_optimizer(source, recast, form.title, form.has_states and not merges)
    if model.lora:
        yield f"its adapters of rank {model.lora.rank}: {_ADAPTERS[form.adapters]}"
    if recast.takes_masters:
        yield "the weights are the optimizer's fp32 masters, from which the source's own were rounded"
    yield from getattr(opened.source, "notes", ())
    yield f"beside the weights: {', '.join(sorted(opened.files)) or 'nothing, the source has no tokenizer'}"


_ADAPTERS = {
    "kept": "stay beside the weights",
    "merged": "go into the weights",
    "alone": "are written, and the weights are not",
}


def _shape(model: ModelConfig) -> str:
    return f"{model.family}, {model.parameters:,} parameters in {model.layers} layers"


def _dtypes(recast: Recast) -> str:
    """How many tensors have which dtype."""
    names = [dtype.name for _, dtype in recast.tensors.values()]
    return " and ".join(f"{names.count(name)} tensors in {name}" for name in sorted(set(names)))


def _of_optimizer(source: Source, recast: Recast, title: str, has_place: bool) -> str:
    if not source.states:
        return "no optimizer state comes along: the source has none, or its weights alone are wanted"
    states = source.states if not has_place else recast.states
    kinds = ", ".join(kind for kind in STATES if any(name.startswith(f"{kind}/") for name in states))
    state = f"the optimizer's state after {source.updates} updates ({kinds})"
    return f"{state} comes along" if has_place else f"{state} is left out: {title} has no place for it"


def inspect_checkpoint(name: str) -> dict[str, Any]:
    """Describe a checkpoint as a JSON value: format, step, and tensors with shapes in elements and sizes in bytes."""
    opened = open_outline(name)
    source, model = opened.source, opened.config
    recast = Recast(source, model, None)
    manifest = source.manifest if isinstance(source, Checkpoint) else {}
    return {
        "path": str(opened.root),
        "format": opened.format.title,
        "family": model.family,
        "parameters": model.parameters,
        "step": manifest.get("step"),
        "updates": source.updates if source.states else None,
        "layout": manifest.get("layout"),
        "files": sorted(opened.files),
        "tensors": [
            {"name": n, "shape": list(shape), "dtype": dtype.name, "bytes": math.prod(shape) * dtype.itemsize}
            for n, (shape, dtype) in recast.tensors.items()
        ],
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The description of `inspect_checkpoint` as text: a line about the whole, then one for each tensor."""
    rows = [(t["name"], str(t["shape"]), t["dtype"], in_words(t["bytes"])) for t in found["tensors"]]
    total = in_words(sum(tensor["bytes"] for tensor in found["tensors"]))
    yield f"{found['path']}: {found['format']}, {found['family']}, {found['parameters']:,} parameters, {total}"
    yield from (f"{key} {found[key]}" for key in ("step", "updates", "layout") if found[key] is not None)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, shape, dtype, size in rows:
        yield f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}"
