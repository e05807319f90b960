"""Learning-rate schedules: linear warm-up, then constant, linear, cosine or warmup-stable-decay."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LearningRateSchedule(BaseModel):
    """The learning rate of each step of a phase, as keys of a recipe's sections of optimizers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(1e-5, gt=0, description="at its highest, after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps over which the rate rises from 0")
    schedule: Literal["constant", "linear", "cosine", "stable"] = Field(
        "constant", description="of the rate after the warm-up; stable falls linearly at the end only"
    )
    decay_share: float = Field(0.2, gt=0, le=1, description="share of all steps in which a stable rate falls")
    final_share: float = Field(0.0, ge=0, le=1, description="what is left of the rate when it has fallen")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, numbered from 1, in a phase of so many steps.

        Cosine: Loshchilov & Hutter 2017, eq. 5, without restarts. Stable: warmup-stable-decay, Hu et al. 2024, eq. 1.
        """
        left = (steps + 1 - step) / max(1, steps - self.warmup_steps)
        if self.schedule == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
        elif self.schedule == "stable":
            left = (steps + 1 - step) / max(1.0, self.decay_share * steps)
        elif self.schedule == "constant":
            left = 1.0
        fallen = self.final_share + (1 - self.final_share) * min(1.0, left)
        return self.learning_rate * min(fallen, step / (self.warmup_steps + 1))
