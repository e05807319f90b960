"""Finds the checkpoint that a run resumes from, its position, and what of the recipe has changed since.

The policy's checkpoint names the step. A model beside it that learns has a checkpoint of the same step in a folder of
its own; all are begun when those before are on disk, and one more than asked for is kept, so that some step is whole.
"""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lockstep.cluster.launch.plan import RunPlan
from lockstep.cluster.recipe.changes import Change, changes
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import parse
from lockstep.cluster.recipe.schema import Recipe
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.checkpoint.integrity import damage, newest_whole
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


def newest(plan: RunPlan, say: Callable[[str], object]) -> Checkpoint | None:
    """The policy's newest whole checkpoint, beside which every model that had been trained by then has a whole one.

    Args:
        say: takes a sentence on newer ones that are damaged.

    Raises:
        RecipeError: when there were some, and none is whole.
    """
    found = newest_whole(plan.checkpoints, lambda place: _damage_beside(plan, place))
    if found.place is None:
        if found.damaged or found.left:
            gone = f"{found.left}, which was the newest, is gone"
            raise RecipeError(
                f"{plan.checkpoints} holds no whole checkpoint ({found if found.damaged else gone}): restore one, or "
                "begin the run again without --resume"
            )
        return None
    last = Checkpoint(found.place)
    if found.damaged:
        step = int(last.manifest["step"])
        again = max(found.damaged) - step
        say(f"{found}; step {step} is whole, and {again} {'step is' if again == 1 else 'steps are'} taken again")
    return last


def _damage_beside(plan: RunPlan, place: Storage) -> str | None:
    """What is wrong with the checkpoints of other models that belong to one of the policy."""
    if plan.recipe.pretrain:
        return None
    for name, other in trained_checkpoints(plan, position_of(Checkpoint(place))).items():
        if reason := damage(other):
            return f"of the {name} beside it, {reason}"
    return None


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


def changes_since(plan: RunPlan, last: Checkpoint) -> tuple[Change, ...]:
    """What the recipe says otherwise than that which a checkpoint was saved with; nothing where that is not known."""
    before = _recipe_of(plan, last)
    return changes(before, plan.recipe) if before else ()


def check_changes(plan: RunPlan, last: Checkpoint) -> None:
    """Whether a run may resume with what has changed in its recipe and in the data that it learns from.

    Raises:
        RecipeError: names the key, the old and the new value.
    """
    known = last.manifest.get("data", {})
    for key, digest in plan.data.items():
        if known.get(key, digest) != digest and not key.startswith("evaluation."):
            raise RecipeError(
                f"{key} has another content (digest {digest}) than when {last.place} was saved (digest {known[key]}): "
                "restore it, or begin another run"
            )
    for change in changes_since(plan, last):
        _check_change(change, last, is_same_data=known.get(change.key) == plan.data.get(change.key, ""))


def _check_change(change: Change, last: Checkpoint, *, is_same_data: bool) -> None:
    over, current, taken = _phases_of(last)
    if change.key == f"{current}.steps" and change.new is not None and change.new < taken:
        raise RecipeError(
            f"{last.place} was saved after {taken} steps of {change.old}, and the recipe says {change.key}="
            f"{change.new}: give {taken} or more"
        )
    if change.key in [f"{phase}.steps" for phase in over] or not (change.is_allowed or is_same_data):
        raise RecipeError(
            f"{last.place} was saved with {change.key}={change.old}, and the recipe says {change.new}: make them "
            f"equal, or begin another run, from these weights with model.source={last.place}"
        )


def _phases_of(last: Checkpoint) -> tuple[tuple[str, ...], str, int]:
    """Sections of the recipe whose phases are over, that of the present phase, and its steps so far."""
    if "position" not in last.manifest:
        return (), "pretrain", int(last.manifest["step"])
    at = position_of(last)
    sections = ("supervised", "preference", "rl")
    current = {"sft": 0, "preference": 1, "reward": 1, "rl": 2}[at.phase]
    return sections[:current], sections[current], at.phase_step


def _recipe_of(plan: RunPlan, last: Checkpoint) -> Recipe | None:
    """The recipe that a checkpoint was saved with: its manifest has it, or, where it is older, the run's folder."""
    values: dict[str, Any] | None = last.manifest.get("recipe")
    written = plan.recipe.folder / "recipe.toml"
    if values is None and written.is_file():
        values = tomllib.loads(written.read_text(encoding="utf-8"))
    try:
        return None if values is None else parse(values)
    except RecipeError as error:
        raise RecipeError(f"{last.place} was saved with a recipe that this version does not read: {error}") from error
