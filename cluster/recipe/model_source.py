"""The [model] section of a recipe: which checkpoint or random weights a run starts from, its dtype and numerics."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lockstep.model.config import ModelConfig, Numerics
from lockstep.model.formats.registry import QUICKSTART_MODEL, ModelContents, open_model, tokenizer_files
from lockstep.model.weights.initialization import RandomWeights


class SourceConfig(BaseModel):
    """The model to start from, the dtype to compute in, and exact or fast numerics."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, Path | str] = Field(
        QUICKSTART_MODEL, description="a checkpoint or its URL, a Hugging Face folder or Hub name, or a .gguf file"
    )
    config: ModelConfig | None = Field(None, description="start from random weights of this shape instead")
    tokenizer: Annotated[str, Path | str] | None = Field(
        None, description="for random weights: a folder, checkpoint or .gguf file with one"
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="in which the model computes")
    numerics: Numerics = Field(
        "fast", description="exact: log-probabilities are the same bits in rollouts and training, at a cost"
    )


def starting_point(config: SourceConfig, seed: int) -> ModelContents:
    """Open the model that a recipe starts from, or make random weights of the given shape.

    Raises:
        BadSource: says what was given and what can be given.
    """
    if config.config is None:
        return open_model(config.source)
    files = tokenizer_files(config.tokenizer) if config.tokenizer else {}
    return ModelContents(RandomWeights(config.config, seed), config.config, files)
