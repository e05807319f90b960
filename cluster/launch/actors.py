"""The actors of a run on problems, started as its recipe says and, where it goes on, with what they had learned."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.cluster.launch.placement import Placement
from lockstep.cluster.launch.plan import Beside, busy, learned, models, optimizer, scorer_source, temperature
from lockstep.cluster.launch.resume import Position, beside, folder, kept_beside, reference_of
from lockstep.cluster.recipe.roles import CriticConfig, ReferenceRoleConfig
from lockstep.cluster.recipe.schema import Recipe
from lockstep.data.tasks.task import Split
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.manager import Checkpoint, step_name
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.model.formats.lockstep import write_checkpoint
from lockstep.rl.learner import Models
from lockstep.rl.remote import Call, gather
from lockstep.rl.workers.worker_groups import EnvironmentGroup, ModelGroup, RolloutGroup, VerifierGroup, threads_for


@dataclass(frozen=True)
class RunActors:
    """Everybody who works for a run."""

    recipe: Recipe
    first: Storage
    """The weights that the run began with."""
    policy: ModelGroup
    rollouts: RolloutGroup
    verifiers: VerifierGroup
    models: Models
    environments: EnvironmentGroup | None

    @property
    def learners(self) -> dict[str, ModelGroup]:
        """By name, the models beside the policy that learn."""
        found = {"critic": self.models.critic, "reward": self.models.reward if learned(self.recipe) else None}
        return {name: model for name, model in found.items() if model}

    def keep_reference(self, step: int) -> None:
        """Write the policy's weights down before RL, for who has them as its reference then or after a restart."""
        if step and (self.recipe.checkpoints.every or self.models.reference):
            self.policy.call("save_reference", step, folder(self.recipe, "reference"))

    def load_reference(self) -> None:
        """Have the reference that is apart from the policy load the weights that RL began with."""
        if self.models.reference:
            kept, model = reference_of(self.recipe, self.first), self.recipe.model
            gather(self.models.reference.start(kept, model.dtype, None, temperature(self.recipe), model.numerics))

    def save(self, said: Mapping[str, Any], at: Position) -> None:
        """Begin a checkpoint of the policy, and of the models beside it that have learned, when those before are there.

        Args:
            said: what manifests say of the run.
        """
        state = bool(self.recipe.checkpoints.every)  # a run that saves its end only does not go on
        step = at.steps
        new = [name for name, place in beside(self.recipe, at).items() if place.name == step_name(step)]
        saving = [self.learners[name] for name in new] if state else []
        for model in (self.policy, *saving):
            model.call("saved")
        for model in (*saving, self.policy):
            model.call("save", step, dict(said), state, False)

    def save_reward_model(self, step: int, said: Mapping[str, Any]) -> None:
        """A checkpoint of the reward model, which `roles.reward.source` of another recipe may name."""
        self.learners["reward"].call("save", step, dict(said), False, False)
        self.learners["reward"].call("saved")

    def resume(self, last: Checkpoint, at: Position) -> None:
        """Have who learns go on from a checkpoint, with the policy's reference as it was then."""
        self.policy.call("restore", last.place)
        for name, place in beside(self.recipe, at).items():
            if Checkpoint(place).states:
                self.learners[name].call("restore", place)
        kept = self.recipe.rl.reference if at.phase == "rl" and self.recipe.rl else None
        if kept and kept.kind != "none" and not self.models.reference:
            weights = last.place if kept.moves else reference_of(self.recipe, self.first)
            self.policy.call("resume_phase", kept, weights)

    def close(self) -> None:
        """Wait for checkpoints, and end the processes that actors have."""
        for model in (*self.learners.values(), self.policy):
            model.call("saved")
        self.verifiers.close()
        if self.environments:
            self.environments.close()


def start(
    recipe: Recipe, first: Storage, last: Checkpoint | None, at: Position, split: Split, placement: Placement
) -> RunActors:
    """All actors, with the first weights or those of a checkpoint; a reference apart loads when RL begins."""
    writing, learning = busy(recipe)
    policy = ModelGroup(
        recipe.layout, threads=threads_for(learning), trainer=recipe.trainer, places=placement.of("policy")
    )
    rollouts = RolloutGroup(recipe.rollout, threads=threads_for(writing), places=placement.of("rollout"))
    verifiers = VerifierGroup(recipe.verifier, recipe.task.grader, placement.of("verifier"))
    others = {name: _model(name, config, recipe, placement) for name, config in models(recipe).items()}
    begun, dtype, numerics = last.place if last else first, recipe.model.dtype, recipe.model.numerics
    calls = policy.start(begun, dtype, optimizer(recipe), temperature(recipe), numerics)
    saved = beside(recipe, at) if last else {}
    for name, model in others.items():
        calls += _loading(name, model, recipe, first, saved.get(name))
    gather(calls + rollouts.start(begun, dtype, numerics) + verifiers.start(programs=split.has_programs))
    known = Models(**others, critic_optimizer=recipe.roles.critic.optimizer)
    crew = RunActors(recipe, first, policy, rollouts, verifiers, known, _environments(recipe, first))
    kept = kept_beside(recipe.checkpoints) if crew.learners else recipe.checkpoints
    policy.call("open_checkpoints", recipe.saves, kept)
    for name, model in crew.learners.items():
        model.call("open_checkpoints", folder(recipe, name), kept)
    return crew


def _environments(recipe: Recipe, first: Storage) -> EnvironmentGroup | None:
    """What answers the policy's turns, where the recipe has it."""
    if recipe.environment.kind == "none":
        return None
    files = Tokenizer(Checkpoint(first).files).files
    environments = EnvironmentGroup(recipe.environment, files, chat=recipe.task.chat)
    gather([environments.ready()])
    return environments


def _model(name: str, config: Beside, recipe: Recipe, placement: Placement) -> ModelGroup:
    """The processes of a model beside the policy."""
    layout, threads = config.layout or recipe.layout, threads_for(busy(recipe)[1])
    return ModelGroup(layout, threads=threads, trainer=recipe.trainer, places=placement.of(name), role=name)


def _loading(name: str, model: ModelGroup, recipe: Recipe, first: Storage, saved: Storage | None) -> list[Call]:
    """Calls that load a model beside the policy, to be gathered; none of a reference.

    Args:
        first: what the policy began with.
        saved: what the model goes on from.
    """
    config, dtype, numerics = models(recipe)[name], recipe.model.dtype, recipe.model.numerics
    if isinstance(config, ReferenceRoleConfig):
        return []
    if isinstance(config, CriticConfig):
        return model.start(saved or first, dtype, config.optimizer, 1.0, numerics, "value")
    learns = recipe.preference.optimizer if recipe.preference and name in learned(recipe) else None
    source: Path | Storage = saved or first
    if config.source and not saved:
        found = scorer_source(name, recipe)
        source = write_checkpoint(found.source, found.config, found.files, recipe.folder / name).resolve()
    heat = temperature(recipe) if name == "teacher" else 1.0
    return model.start(source, dtype, learns, heat, numerics, "value" if learns else None)
