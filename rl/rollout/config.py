"""Configuration of rollout engines, of the rollout workers of a recipe, and of sampling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lockstep.model.config import ModelConfig
from lockstep.rl.weight_sync.config import WeightSyncConfig

OnUpdate = Literal["finish", "pause", "restart"]
"""What running requests do when new weights come: `finish` under the old weights first, `pause` and go on with the keys
and values that the old weights made, or `restart`: these are computed again under the new weights. Every token carries
the version of the weights that drew it."""


EngineName = Literal["lockstep", "vllm"]

OPENING: Mapping[EngineName, str] = {
    "lockstep": "lockstep.rl.rollout.loading",
    "vllm": "lockstep.rl.rollout.vllm.loading",
}
"""The module whose `open_rank` opens an engine. The process that runs the engine imports it by this name: what one of
them needs is not there in the environment of another."""

INEXACT: frozenset[EngineName] = frozenset({"vllm"})
"""Engines whose log-probabilities are not the trainer's, even for the very weights that it has."""

Meeting = tuple[str, int]
"""Address and port of the rendezvous store of a model's tensor ranks."""


class EngineConfig(BaseModel):
    """What one rollout engine may use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequences: int = Field(64, ge=1, description="completions that one worker writes at the same time")
    length: int = Field(1 << 20, ge=2, description="tokens of the longest prompt and completion together")
    cache_gib: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="memory for keys and values of each process, at most"
    )
    budget: int = Field(2048, ge=1, description="tokens of one forward pass, of prompts and completions together")
    speculate: int = Field(
        0,
        ge=0,
        le=15,
        description="tokens of a completion that a pass computes on trial, as they followed before; 0: none",
    )
    on_update: OnUpdate = Field("restart", description="what completions that are being written do at new weights")


class RolloutConfig(WeightSyncConfig, EngineConfig):
    """The section [rollout] of a recipe: how many engines there are, what each may use, and how weights reach them."""

    engine: EngineName = Field("lockstep", description="what generates: our engine, or vLLM in another environment")
    python: Annotated[str, Path] = Field(
        "", description="of engine='vllm': the interpreter of the environment that vLLM is in"
    )
    workers: int = Field(2, ge=1, description="engines, each with a copy of the model")
    tensor: int = Field(1, ge=1, description="processes that each worker's model is split over")
    length: int = Field(512, ge=2, description="tokens of the longest prompt and completion together")
    replay_routing: bool = Field(
        False, description="of a model with experts: the policy trains with those that the rollout's tokens went to"
    )

    @model_validator(mode="after")
    def _has_what_the_engine_needs(self) -> "RolloutConfig":
        if self.engine == "lockstep" and self.python:
            raise ValueError(f"python={self.python} is of engine='vllm', and engine='lockstep': leave it out")
        if self.engine == "vllm" and not self.python:
            raise ValueError(
                "engine='vllm' runs in an environment of its own: name its interpreter in rollout.python, such as "
                ".venv-vllm/bin/python, which `make vllm` makes"
            )
        if self.engine == "vllm" and self.tensor > 1:
            raise ValueError(f"engine='vllm' has one process for a model, and tensor={self.tensor}: set tensor=1")
        if self.engine == "vllm" and self.speculate:
            raise ValueError(
                f"engine='vllm' draws by our sampler, which vLLM does not combine with speculation, and "
                f"speculate={self.speculate}: set speculate=0, or engine='lockstep'"
            )
        if self.engine == "vllm" and self.replay_routing:
            raise ValueError(
                "engine='vllm' does not say which experts tokens went to, and replay_routing=true: set "
                "replay_routing=false, or engine='lockstep'"
            )
        return self


def check_recordable(model: ModelConfig) -> None:
    """Check that an engine can record which experts the tokens of a model go to.

    Raises:
        ValueError: where there are none, or each layer gives the blocks behind its window back.
    """
    if model.moe is None:
        raise ValueError(
            "rollout.replay_routing=true is for a model with experts, and this one has none: set "
            "rollout.replay_routing=false"
        )
    if all(model.window_of(layer) is not None for layer in range(model.layers)):
        raise ValueError(
            f"rollout.replay_routing=true needs a layer that sees all tokens, and all {model.layers} layers of this "
            f"model see {model.window} tokens: set rollout.replay_routing=false"
        )


COLDEST, LARGEST = 1e-3, 1e9
"""The smallest temperature beside 0, and the largest of it, of penalties and of biases: whatever options meet, logits
stay finite in fp32, and log-probabilities keep their digits."""

LONGEST = 1 << 31
"""Tokens; no context is longer."""

Penalty = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Limit = Annotated[int, Field(ge=0, le=LONGEST)]


class SamplingParams(BaseModel):
    """Sampling options of a completion, and the conditions that end it.

    The options apply in this order: penalties and bias, minimum length, temperature, top-k, top-p, min-p. Recipes, the
    command line and requests to the server are all validated here; a boolean or a text is no number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    temperature: float = Field(1.0, ge=0, le=LARGEST, allow_inf_nan=False, description="0 takes the likeliest token")
    top_k: Limit = Field(0, description="draw from the k likeliest tokens; 0 for all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the likeliest tokens of this total probability")
    min_p: float = Field(0.0, ge=0, le=1, description="draw from tokens this likely relative to the likeliest")
    repetition_penalty: float = Field(
        1.0, ge=1 / LARGEST, le=LARGEST, description="logits of tokens seen, the prompt's too, are divided by it"
    )
    frequency_penalty: Penalty = Field(
        0.0, description="taken from a token's logit each time that the completion has it"
    )
    presence_penalty: Penalty = Field(0.0, description="taken from the logits of tokens that the completion has")
    logit_bias: dict[int, Penalty] = Field({}, description="added to the logits of tokens, by their numbers")
    max_new_tokens: int = Field(64, ge=1, le=LONGEST, description="tokens of the completion at most")
    min_new_tokens: Limit = Field(0, description="tokens before one that ends the completion may be drawn")
    exact_lengths: tuple[Annotated[int, Field(ge=1, le=LONGEST)], ...] = Field(
        (), strict=False, description="for measurements: how many tokens each sample has, whatever it says; in turn"
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), strict=False, description="end a completion that contains one of these strings"
    )
    stop_tokens: tuple[int, ...] = Field(
        (), strict=False, description="end a completion with one of these, beside the model's own"
    )
    logprobs: Limit = Field(0, description="report this many of the likeliest tokens at each place")
    support: bool = Field(False, description="keep for each token the tokens that it was drawn among")

    @field_validator("temperature")
    @classmethod
    def _drawable(cls, given: float) -> float:
        if 0 < given < COLDEST:
            raise ValueError(f"use 0, which takes the likeliest token, or {COLDEST:g} and more")
        return given

    @property
    def longest(self) -> int:
        """The most new tokens that any sample may have."""
        return max((self.max_new_tokens, *self.exact_lengths)) if self.exact_lengths else self.max_new_tokens


def with_stop_tokens(sampling: SamplingParams, special: Mapping[int, str]) -> SamplingParams:
    """The same sampling, where stop strings that are names of special tokens are stop tokens as well."""
    named = tuple(token for token, name in special.items() if name in sampling.stop)
    return sampling.model_copy(update={"stop_tokens": (*sampling.stop_tokens, *named)}) if named else sampling
