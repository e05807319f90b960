"""The keys of a recipe's sections and the types of their values, found in the pydantic models."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

BARE = re.compile(r"[A-Za-z0-9_-]+")  # toml.io/en/v1.0.0#keys


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key and every section, as `rl.optimizer.learning_rate`."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = section_type(field.annotation)
        if inner is not None:
            yield from dotted_keys(inner, f"{prefix}{name}.")


def written_key(place: Iterable[str | int]) -> str:
    """A key as TOML writes it: `pretrain.data.blend[1].path`, and in quotes what is no bare key, as a line break."""
    written = (
        f"[{part}]" if isinstance(part, int) else f".{part if BARE.fullmatch(part) else json.dumps(part)}"
        for part in place
    )
    return "".join(written).removeprefix(".")


def annotation(place: Sequence[str], root: type[BaseModel]) -> Any:
    """The type of a key; None where there is no such key."""
    model: type[BaseModel] | None = root
    annotation: Any = None
    for part in place:
        field = model.model_fields.get(part) if model else None
        annotation = field.annotation if field else None
        model = section_type(annotation)
    return annotation


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, of one that may be missing, or of the elements of a list of sections."""
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def is_mapping(annotation: Any) -> bool:
    """Whether the keys below are the user's own, as in `task.settings`."""
    options = (annotation, *getattr(annotation, "__args__", ()))
    return any(getattr(option, "__origin__", None) is dict for option in options)
