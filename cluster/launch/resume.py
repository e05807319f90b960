"""Where a run is, as its checkpoints say it, and which of them it can go on from.

The policy's checkpoint names the step. A model beside it that learns has a checkpoint of the same step in a folder of
its own; all are begun when those before are on disk, and one more than asked for is kept, so that some step is whole.
"""

from dataclasses import dataclass
from typing import Any

from lockstep.cluster.launch.plan import learned, models, optimizer
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.schema import Recipe
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.saver import CheckpointConfig
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.model.training.config import PretrainConfig
from lockstep.rl.algorithms.config import RLConfig


@dataclass(frozen=True)
class Position:
    """Where a run is: which step of which phase its weights are of."""

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
        """Steps of a phase that have been taken, where it is the present one."""
        return self.phase_step if self.phase == phase else 0

    def adapted(self, config: RLConfig) -> RLConfig:
        """The recipe of the next step of RL."""
        return config if self.kl_beta is None else config.model_copy(update={"kl_beta": self.kl_beta})


def position_of(last: Checkpoint | None) -> Position:
    """What a checkpoint says of its place in a run; the beginning where there is none."""
    if last is None:
        return Position()
    return Position(**last.manifest["position"], steps=int(last.manifest["step"]))


def continued(recipe: Recipe) -> list[tuple[str, str, Any]]:
    """What must be as it was where a run goes on: its key in a manifest, its key in the recipe, and its value."""
    supervised, preference, rl = recipe.supervised, recipe.preference, recipe.rl
    found: list[tuple[str, str, Any]] = [
        ("optimizer", "optimizer.kind", optimizer(recipe).kind),
        ("problems_per_step", "supervised.problems_per_step", supervised and supervised.problems_per_step),
        ("prompts_per_step", "rl.prompts_per_step", rl and rl.prompts_per_step),
        ("group_size", "rl.group_size", rl and rl.group_size),
    ]
    if preference:
        found.append(("preference", "preference.method", preference.method))
        found.append(("groups_per_step", "preference.groups_per_step", preference.groups_per_step))
    return found


def newest(recipe: Recipe) -> Checkpoint:
    """The policy's last checkpoint that all models which had learned by then have one beside.

    Raises:
        RecipeError: when there is none.
    """
    steps = manager.saved(recipe.saves)
    for step in sorted(steps, reverse=True):
        found = Checkpoint(steps[step])
        if all(place.has(manager.MANIFEST) for place in beside(recipe, position_of(found)).values()):
            return found
    names = " or ".join(name for name in ("critic", "reward") if name in models(recipe))
    raise RecipeError(
        f"{recipe.saves} has checkpoints of the policy, and beside none of them one of the {names}: begin the run again"
    )


def beside(recipe: Recipe, at: Position) -> dict[str, Storage]:
    """By name, the checkpoints of the models beside the policy that had learned by then."""
    steps: dict[str, int] = {}
    if "critic" in models(recipe) and at.phase == "rl":
        steps["critic"] = at.steps
    if learned(recipe) and at.phase in ("reward", "rl"):
        steps["reward"] = at.steps if at.phase == "reward" else before_rl(recipe)
    return {name: folder(recipe, name) / manager.step_name(step) for name, step in steps.items()}


def folder(recipe: Recipe, name: str) -> Storage:
    """Where the checkpoints of a model beside the policy are, those of the fixed reference included."""
    return recipe.saves / name


def kept_beside(config: CheckpointConfig) -> CheckpointConfig:
    """How many checkpoints of a model beside the policy, and of such a policy, stay."""
    return config.model_copy(update={"keep_last": config.keep_last and config.keep_last + 1})


def before_rl(recipe: Recipe) -> int:
    """Steps of the phases before RL."""
    return sum(phase.steps for phase in (recipe.supervised, recipe.preference) if phase)


def reference_of(recipe: Recipe, first: Storage) -> Storage:
    """The weights that RL began with."""
    before = before_rl(recipe)
    return manager.saved(folder(recipe, "reference"))[before] if before else first


def continued_text(config: PretrainConfig) -> list[tuple[str, str, Any]]:
    """What must be as it was where a run goes on: its key in a manifest, its key in the recipe, and its value."""
    return [
        ("optimizer", "pretrain.optimizer.kind", config.optimizer.kind),
        ("samples_per_step", "pretrain.samples_per_step", config.samples_per_step),
    ]
