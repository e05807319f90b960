"""The [roles] section of a recipe: devices, layout and checkpoint of each role."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lockstep.distributed.layout import Layout
from lockstep.model.training.config import OptimizerConfig
from lockstep.rl.algorithms.config import RLConfig

_GPUS = "GPUs that each process reserves; 1 where it has a model, is not placed together and the cluster has GPUs"


class RoleConfig(BaseModel):
    """Where the processes of a role run, and which resources each reserves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    place: Literal["together", "apart"] = Field(
        "together", description="in turns on what the policy's processes reserve, or on devices of its own"
    )
    cpus: float = Field(0.0, ge=0, description="cores that each process reserves; 0 for none")
    gpus: float | None = Field(None, ge=0, description=_GPUS)

    @model_validator(mode="after")
    def _reserves_apart(self) -> "RoleConfig":
        if self.place == "together" and (self.cpus or self.gpus):
            raise ValueError("who is placed together reserves nothing: set place = 'apart', or leave cpus and gpus out")
        return self


class PolicyRoleConfig(BaseModel):
    """The resources that each process of the policy reserves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpus: float = Field(0.0, ge=0, description="cores that each process reserves; 0 for none")
    gpus: float | None = Field(None, ge=0, description=_GPUS)


class CriticConfig(RoleConfig):
    """A critic: the policy's first weights with a value head, trained with an optimizer of its own."""

    layout: Layout | None = Field(None, description="as [layout], which it is where none is given")
    optimizer: OptimizerConfig = OptimizerConfig()


class ScorerConfig(RoleConfig):
    """A model that scores completions: a reward model, or a teacher."""

    source: Annotated[str, Path | str] = Field(
        "", description="a checkpoint, a folder or a name, as of [model]; empty for none"
    )
    layout: Layout | None = Field(None, description="as [layout], which it is where none is given")


class ReferenceRoleConfig(RoleConfig):
    """The reference: in the policy's own processes where it is placed together, else in processes of its own."""

    layout: Layout | None = Field(None, description="as [layout], which it is where none is given; only apart")


class RolesConfig(BaseModel):
    """The configuration of every role."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: PolicyRoleConfig = PolicyRoleConfig()
    rollout: RoleConfig = RoleConfig()
    verifier: RoleConfig = RoleConfig()
    environment: RoleConfig = RoleConfig()
    reference: ReferenceRoleConfig = ReferenceRoleConfig()
    critic: CriticConfig = CriticConfig()
    reward: ScorerConfig = ScorerConfig()
    teacher: ScorerConfig = ScorerConfig()
    wait: float = Field(
        3600.0, ge=0, description="seconds to wait for devices that are in use, or that an autoscaler brings"
    )

    def check_uses(self, rl: RLConfig, *, trains_reward: bool, has_environment: bool) -> None:
        """Raises where RL has no use for a role that is configured, or lacks one that it needs.

        Raises:
            ValueError: names the role.
        """
        teaches = rl.advantage == "teacher"
        uses = {
            "critic": (rl.advantage == "gae", "rl.advantage is 'gae', as of method='ppo'"),
            "teacher": (teaches, "rl.advantage is 'teacher', as of method='distill'"),
            "reference": (rl.reference.kind != "none", "rl.kl_beta is above 0"),
            "reward": (trains_reward or bool(self.reward.source), "it has a source, or [preference] trains one"),
            "environment": (has_environment, "[environment] has a kind"),
        }
        for name, (used, when) in uses.items():
            given = getattr(self, name)
            if not used and given != type(given)():
                raise ValueError(f"roles.{name} has no effect: it is used where {when}")
        if teaches and not self.teacher.source:
            raise ValueError("rl.advantage='teacher' needs a model that judges tokens: set roles.teacher.source")
        if teaches and self.reference.place == "apart":
            raise ValueError(
                "roles.reference is apart, where rl.advantage='teacher' has its teacher: place it together"
            )

    @property
    def by_name(self) -> dict[str, RoleConfig]:
        """All roles but the policy."""
        return {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), RoleConfig)}
