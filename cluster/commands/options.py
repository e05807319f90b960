"""Options that commands share."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

if TYPE_CHECKING:
    from lockstep.rl.rollout.config import SamplingParams


Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key, as in --set rl.group_size=8.")]


def check_choice(option: str, given: str | None, known: Iterable[str | None]) -> None:
    if given not in known:
        *first, last = (word for word in known if word)
        raise ValueError(f"{option} {given!r} is not supported: use {', '.join(first)} or {last}")


Checkpoint = Annotated[str, typer.Argument(help="A checkpoint, a run, a Hugging Face folder or a .gguf file.")]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.")]
CacheGib = Annotated[float, typer.Option(min=0.001, help="GiB for keys and values, taken as they are needed.")]


def sampling_of(**values: Any) -> "SamplingParams":
    """How tokens are drawn; what is not allowed is one sentence."""
    from lockstep.cluster.recipe.errors import validation_sentence
    from lockstep.rl.rollout.config import SamplingParams

    try:
        return SamplingParams(**values)
    except ValidationError as error:
        raise ValueError(validation_sentence(error, SamplingParams)) from error
