"""The [recovery] section of a recipe: when a worker counts as dead, and how often a run begins again."""

from pydantic import BaseModel, ConfigDict, Field


class RecoveryConfig(BaseModel):
    """What a run does about workers that stop, and about the death of a model's rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stopped_after: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds after which a worker whose process is stopped, as by SIGSTOP, is ended and counts as dead",
    )
    restarts: int = Field(
        3,
        ge=0,
        description="how often within an hour the run begins again from its newest whole checkpoint, in the same "
        "layout, when a rank of a model has died; 0 ends it then",
    )
