"""Finds the checkpoint that a run resumes from, and its position: phase, step, weight version.

The policy's checkpoint names the step. A model beside it that learns has a checkpoint of the same step in a folder of
its own; all are begun when those before are on disk, and one more than asked for is kept, so that some step is whole.
"""

from dataclasses import dataclass

from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.rl.algorithms.config import RLConfig


@dataclass(frozen=True)
class Position:
    """The position of a run: phase and step that its weights are of."""

    phase: str = "sft"
    phase_step: int = 0
    group: int = 0
    """Number of the next group of prompts of RL."""
    version: int = 0
    """Of the weights that rollout workers have."""
    kl_beta: float | None = None
    """Of the next step of RL, where it is adapted."""
    steps: int = 0
    """Of all phases."""

    def done(self, phase: str) -> int:
        """Steps taken of a phase; 0 where it is not the present one."""
        return self.phase_step if self.phase == phase else 0

    def adapted(self, config: RLConfig) -> RLConfig:
        """The RL configuration of the next step, with the adapted KL coefficient."""
        return config if self.kl_beta is None else config.model_copy(update={"kl_beta": self.kl_beta})


def position_of(last: Checkpoint | None) -> Position:
    """The position that a checkpoint's manifest records; the beginning where there is none."""
    if last is None:
        return Position()
    return Position(**last.manifest["position"], steps=int(last.manifest["step"]))


def newest(plan: RunPlan) -> Checkpoint:
    """The policy's last checkpoint beside which every model that had been trained by then has one.

    Raises:
        RecipeError: when there is none.
    """
    steps = manager.saved(plan.checkpoints)
    for step in sorted(steps, reverse=True):
        found = Checkpoint(steps[step])
        if all(place.has(manager.MANIFEST) for place in trained_checkpoints(plan, position_of(found)).values()):
            return found
    raise RecipeError(
        f"{plan.checkpoints} has checkpoints of the policy, and beside none of them one of the "
        f"{' or '.join(name for name in ('critic', 'reward') if name in plan.models)}: begin the run again"
    )


def trained_checkpoints(plan: RunPlan, at: Position) -> dict[str, Storage]:
    """By role, the checkpoints that belong to a position, of the models beside the policy that were trained by then."""
    steps: dict[str, int] = {}
    if "critic" in plan.trained_models and at.phase == "rl":
        steps["critic"] = at.steps
    if "reward" in plan.trained_models and at.phase in ("reward", "rl"):
        steps["reward"] = at.steps if at.phase == "reward" else plan.steps_before_rl
    return {name: plan.checkpoints_of(name) / manager.step_name(step) for name, step in steps.items()}


def reference_of(plan: RunPlan, first: Storage) -> Storage:
    """The weights that RL began with.

    Args:
        first: the weights that the run began with.
    """
    before = plan.steps_before_rl
    return manager.saved(plan.checkpoints_of("reference"))[before] if before else first
