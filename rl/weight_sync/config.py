"""Configuration of weight sync: how messages of weights travel from the policy to rollout workers."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Transport = Literal["auto", "memory", "broadcast"]
"""Through Ray's shared memory on one host, by gloo broadcasts, or `auto`: the first where all are on one host."""


class WeightSyncConfig(BaseModel):
    """Size of a message of weights, and what carries it; keys of a recipe's section [rollout]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bucket_mib: float = Field(64.0, gt=0, description="weights travel in messages of at most this size")
    transport: Transport = Field(
        "auto", description="how: in shared memory, by broadcasts between hosts, or as where processes run asks for"
    )
