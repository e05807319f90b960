"""Configuration of rollout engines, of the rollout workers of a recipe, and of sampling."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lockstep.rl.weight_sync.config import WeightSyncConfig

OnUpdate = Literal["finish", "pause", "restart"]
"""What running requests do when new weights come: `finish` under the old weights first, `pause` and go on with the keys
and values that the old weights made, or `restart`: these are computed again under the new weights. Every token carries
the version of the weights that drew it."""


class EngineConfig(BaseModel):
    """What one rollout engine may use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequences: int = Field(64, ge=1, description="completions that one worker writes at the same time")
    length: int = Field(1 << 20, ge=2, description="tokens of the longest prompt and completion together")
    cache_gib: float = Field(1.0, gt=0, description="memory for keys and values of each process, at most")
    budget: int = Field(2048, ge=1, description="tokens of one forward pass, of prompts and completions together")
    on_update: OnUpdate = Field("restart", description="what completions that are being written do at new weights")


class RolloutConfig(WeightSyncConfig, EngineConfig):
    """The section [rollout] of a recipe: how many engines there are, what each may use, and how weights reach them."""

    workers: int = Field(2, ge=1)
    tensor: int = Field(1, ge=1, description="processes that each worker's model is split over")
    length: int = Field(512, ge=2, description="tokens of the longest prompt and completion together")


class SamplingParams(BaseModel):
    """Sampling options of a completion, and the conditions that end it.

    The options apply in this order: penalties and bias, minimum length, temperature, top-k, top-p, min-p.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False, description="0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="draw from the k likeliest tokens; 0 for all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the likeliest tokens of this total probability")
    min_p: float = Field(0.0, ge=0, le=1, description="draw from tokens this likely relative to the likeliest")
    repetition_penalty: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="logits of tokens seen, the prompt's too, are divided by it"
    )
    frequency_penalty: float = Field(
        0.0, allow_inf_nan=False, description="taken from a token's logit each time that the completion has it"
    )
    presence_penalty: float = Field(
        0.0, allow_inf_nan=False, description="taken from the logits of tokens that the completion has"
    )
    logit_bias: dict[int, float] = Field({}, description="added to the logits of tokens, by their numbers")
    max_new_tokens: int = Field(64, ge=1)
    min_new_tokens: int = Field(0, ge=0, description="tokens before one that ends the completion may be drawn")
    exact_lengths: tuple[int, ...] = Field(
        (), description="for measurements: how many tokens each sample has, whatever it says; in turn"
    )
    stop: tuple[str, ...] = Field((), description="end a completion that contains one of these strings")
    stop_tokens: tuple[int, ...] = Field((), description="end a completion with one of these, beside the model's own")
    logprobs: int = Field(0, ge=0, description="report this many of the likeliest tokens at each place")
    support: bool = Field(False, description="keep for each token the tokens that it was drawn among")

    @property
    def longest(self) -> int:
        """The most new tokens that any sample may have."""
        return max((self.max_new_tokens, *self.exact_lengths)) if self.exact_lengths else self.max_new_tokens
