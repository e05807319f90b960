"""How rollouts and learning take turns, as a recipe says it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FlowConfig(BaseModel):
    """How rollouts and learning take turns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["synchronous", "one_step_off", "asynchronous"] = Field(
        "synchronous", description="write, then learn; write the next batch while learning; or write on through it all"
    )
    max_staleness: int = Field(
        4, ge=1, description="versions between the weights behind a sample and those that learn from it, asynchronous"
    )

    dynamic_sampling: bool = Field(
        False, description="ask for other prompts in the place of those whose completions all fare alike"
    )
    most: float = Field(
        4.0, ge=1, description="with dynamic_sampling, prompts that a step asks for at most, in prompts_per_step"
    )

    release: bool = Field(
        False, description="between writing and learning, give memory back to the other: for roles that share devices"
    )

    @property
    def staleness(self) -> int:
        """The bound, in versions."""
        return {"synchronous": 0, "one_step_off": 1, "asynchronous": self.max_staleness}[self.mode]

    @model_validator(mode="after")
    def _releases_between_phases(self) -> "FlowConfig":
        if self.release and self.mode != "synchronous":
            raise ValueError(
                f"with mode={self.mode} rollouts and learning use memory at the same time: set release=false"
            )
        return self

    @property
    def in_waves(self) -> bool:
        """Whether new groups are asked for only when all before have been written, so that no timing matters."""
        return self.mode != "asynchronous"
