"""The keys of a recipe's sections and the types of their values, found in the pydantic models."""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key and every section, as `rl.optimizer.learning_rate`."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = section_type(field.annotation)
        if inner is not None:
            yield from dotted_keys(inner, f"{prefix}{name}.")


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
