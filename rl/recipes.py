"""The methods as values: what a phase of training optimises, and with which batch."""

from functools import partial
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lockstep.model.loss import Clip, Objective, token_loss
from lockstep.model.recipes import OptimizerConfig
from lockstep.rl.rollout.sampling import SamplingConfig


class SupervisedConfig(BaseModel):
    """A supervised stage: the answers to training problems, in the form that task.completion gives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(10, ge=0)
    problems_per_step: int = Field(32, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()


class RLConfig(BaseModel):
    """GRPO and its near relatives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(100, ge=0)
    prompts_per_step: int = Field(32, ge=1)
    group_size: int = Field(8, ge=2, description="completions of each prompt")
    advantage: Literal["grpo", "dr_grpo"] = Field("grpo", description="grpo divides by the group's deviation")
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    kl_beta: float = Field(0.0, ge=0, description="weight of the KL to the policy that RL started from, in the loss")
    optimizer: OptimizerConfig = OptimizerConfig()
    sampling: SamplingConfig = SamplingConfig()

    @property
    def objective(self) -> Objective:
        """The loss of this recipe."""
        clip = Clip(self.clip_low, self.clip_high)
        return partial(token_loss, clip=clip, kl_beta=self.kl_beta, has_reference=True)
