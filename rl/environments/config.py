"""The `[environment]` section of a recipe: which environment answers the policy's turns, and its limits."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lockstep.data.tasks.user_function import function_name

TOOLS = ("calculator", "python")


class EnvironmentConfig(BaseModel):
    """Kind, tools and limits of the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Annotated[str, Callable] = Field(
        "none", description="none, tools, gym, or module:Class or file.py:Class of your own"
    )
    tools: tuple[str, ...] = Field(TOOLS, description="of kind tools: what the model may call")
    settings: dict[str, Any] = Field({}, description="arguments of your own class")
    workers: int = Field(1, ge=1, description="processes that episodes are shared out to; each stays where it began")
    turns: int = Field(4, ge=1, description="turns of the model at most")
    deadline: float = Field(20.0, gt=0, description="seconds for one answer; a rollout that waits longer is ungradable")
    stop: tuple[str, ...] = Field((), description="texts that end a turn, beside the recipe's")
    processes: int = Field(
        1, ge=1, description="of each worker, that run programs or score answers; more wait, within the deadline"
    )

    @model_validator(mode="after")
    def _is_known(self) -> "EnvironmentConfig":
        if self.kind not in ("none", "tools", "gym") and not self.is_own:
            raise ValueError(
                f"environment.kind={self.kind!r} is not known: use none, tools, gym, module:Class or file.py:Class"
            )
        strange = next((name for name in self.tools if name not in TOOLS), None)
        if strange is not None or not self.tools:
            raise ValueError(f"environment.tools has {strange!r}: use one or more of {', '.join(TOOLS)}")
        return self

    @property
    def is_own(self) -> bool:
        """Whether `kind` names a class or function of the user's, as `module:Class` or `file.py:Class`."""
        return function_name(self.kind) is not None
