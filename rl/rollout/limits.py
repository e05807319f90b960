"""What the rollout workers of a recipe may use."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Transport = Literal["auto", "memory", "broadcast"]

OnUpdate = Literal["finish", "pause", "restart"]
"""What new weights mean to requests that run: they end under the old ones first, or go on with the keys and values that
the old ones made, or these are computed again under the new ones. Every token carries the version that drew it."""


class RolloutLimits(BaseModel):
    """The rollout workers: how many there are, and what each may use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int = Field(2, ge=1)
    tensor: int = Field(1, ge=1, description="processes that each worker's model is split over")
    sequences: int = Field(64, ge=1, description="completions that one worker writes at the same time")
    length: int = Field(512, ge=2, description="tokens of the longest prompt and completion together")
    cache_gib: float = Field(1.0, gt=0, description="memory for keys and values of each process, at most")
    budget: int = Field(2048, ge=1, description="tokens of one forward pass, of prompts and completions together")
    on_update: OnUpdate = Field("restart", description="what completions that are being written do at new weights")
    bucket_mib: float = Field(64.0, gt=0, description="weights travel in messages of at most this size")
    transport: Transport = Field(
        "auto", description="how: in shared memory, by broadcasts between hosts, or as where processes run asks for"
    )
