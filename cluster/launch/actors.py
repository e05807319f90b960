"""The actors of a run on problems, started as its recipe says and, where it goes on, with what they had learned."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lockstep.cluster.launch.placement import Placement
from lockstep.cluster.launch.plan import ModelRole, RunPlan
from lockstep.cluster.launch.preflight import CheckedRun
from lockstep.cluster.launch.resume import Position, reference_of, trained_checkpoints
from lockstep.cluster.recipe.schema import Recipe
from lockstep.data.tasks.mixture import ProblemSet
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.manager import Checkpoint, step_name
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.model.formats.lockstep import write_checkpoint
from lockstep.rl.learner import Models
from lockstep.rl.remote import ActorHandle, Call, WorkerDied, gather
from lockstep.rl.verifiers.config import PROGRAMS
from lockstep.rl.workers.stubs import ModelWorker
from lockstep.rl.workers.worker_groups import EnvironmentGroup, ModelGroup, RolloutGroup, VerifierGroup


@dataclass(frozen=True)
class RunActors:
    """Everybody who works for a run."""

    plan: RunPlan
    first: Storage
    """The weights that the run began with."""
    policy: ModelGroup
    rollouts: RolloutGroup
    verifiers: VerifierGroup
    models: Models
    environments: EnvironmentGroup | None

    @property
    def learners(self) -> dict[str, ModelGroup]:
        """By role, the models beside the policy that are trained."""
        return {name: model for name, model in self.models.by_role.items() if name in self.plan.trained_models}

    def workers(self) -> list[ActorHandle[Any]]:
        """All that work at present."""
        models = [self.policy, *self.models.by_role.values()]
        environments = self.environments.workers if self.environments else []
        return [*chain(*(m.workers for m in models), *self.rollouts.teams), *self.verifiers.workers, *environments]

    def keep_reference(self, step: int) -> None:
        """Write the policy's weights down before RL, for who has them as its reference then or after a restart."""
        saves, rl = self.plan.recipe.checkpoints, self.plan.recipe.rl
        held = rl is not None and rl.reference.kind != "none" and not rl.reference.moves
        if step and (self.models.reference or (held and (saves.every or saves.grace))):
            self.policy.call(ModelWorker.save_reference, step, self.plan.checkpoints_of("reference"))

    def load_reference(self) -> None:
        """Have the reference that is apart from the policy load the weights that RL began with."""
        if self.models.reference:
            kept, model = reference_of(self.plan, self.first), self.plan.recipe.model
            heat = self.plan.models["reference"].temperature
            gather(self.models.reference.start(kept, model.dtype, None, heat, model.numerics))
            self.models.reference.check_agreement()

    def save(self, said: Mapping[str, Any], at: Position, *, state: bool, best: bool = False) -> None:
        """Begin a checkpoint of the policy, and of the models beside it that have learned, when those before are there.

        Args:
            said: what manifests say of the run.
            state: save what a run needs to go on: optimizers, a moving reference, and the models beside the policy.
            best: let the link `best` point to the policy's.
        """
        step = at.steps
        new = [name for name, place in trained_checkpoints(self.plan, at).items() if place.name == step_name(step)]
        saving = [self.learners[name] for name in new] if state else []
        for model in (self.policy, *saving):
            model.call(ModelWorker.saved)
        for model in (*saving, self.policy):
            model.call(ModelWorker.save, step, dict(said), state, best and model is self.policy)

    def save_reward_model(self, step: int, said: Mapping[str, Any]) -> None:
        """A checkpoint of the reward model, which `roles.reward.source` of another recipe may name."""
        self.learners["reward"].call(ModelWorker.save, step, dict(said), False, False)
        self.learners["reward"].call(ModelWorker.saved)

    def resume(self, last: Checkpoint, at: Position) -> None:
        """Have who learns go on from a checkpoint, with the policy's reference as it was then."""
        self.policy.call(ModelWorker.restore, last.place)
        for name, place in trained_checkpoints(self.plan, at).items():
            if Checkpoint(place).states:
                self.learners[name].call(ModelWorker.restore, place)
        rl = self.plan.recipe.rl
        kept = rl.reference if at.phase == "rl" and rl else None
        if kept and kept.kind != "none" and not self.models.reference:
            weights = last.place if kept.moves else reference_of(self.plan, self.first)
            self.policy.call(ModelWorker.resume_phase, kept, weights)
            self.policy.check_reference(weights)

    def saved(self) -> None:
        """Wait for checkpoints."""
        for model in (*self.learners.values(), self.policy):
            model.call(ModelWorker.saved)

    def close(self) -> None:
        """Wait for checkpoints, and end the processes that actors have."""
        self.saved()
        with suppress(WorkerDied):  # which has nothing left to do
            self.verifiers.close()
        if self.environments:
            with suppress(WorkerDied):
                self.environments.close()


def make_actors(plan: RunPlan, first: Storage, placement: Placement) -> RunActors:
    """Start the processes of all actors, without waiting for them; `start_actors` loads their weights.

    Args:
        first: the policy's first weights, as a checkpoint of ours.
    """
    recipe = plan.recipe
    policy = _model(plan.policy, plan, placement)
    rollouts = RolloutGroup(recipe.rollout, places=placement.of("rollout"))
    verifiers = VerifierGroup(recipe.verifier, placement.of("verifier"), recipe.rewards.user_functions)
    models = Models(
        **{name: _model(role, plan, placement) for name, role in plan.models.items()},
        critic_optimizer=recipe.roles.critic.optimizer,
    )
    return RunActors(plan, first, policy, rollouts, verifiers, models, _environments(recipe, first, placement))


def start_actors(
    actors: RunActors, run: CheckedRun, last: Checkpoint | None, at: Position, problems: Sequence[ProblemSet]
) -> None:
    """Load the weights of all actors, the first ones or those of a checkpoint; a reference apart loads later.

    Args:
        last: the checkpoint that the run resumes from, at position `at`.
    """
    plan, recipe, first = actors.plan, actors.plan.recipe, actors.first
    policy, rollouts, verifiers, environments = actors.policy, actors.rollouts, actors.verifiers, actors.environments
    begun, dtype, numerics = last.place if last else first, recipe.model.dtype, recipe.model.numerics
    calls = policy.start(begun, dtype, plan.policy.optimizer, plan.policy.temperature, numerics)
    saved = trained_checkpoints(plan, at) if last else {}
    others = {name: model for name, model in actors.models.by_role.items() if name != "reference"}
    for name, model in others.items():
        calls += _loading(plan.models[name], model, recipe, saved.get(name) or _first_weights(name, run, first))
    # A rollout worker that replaces one which died loads the same again, and `begun` may have been thinned out by then.
    calls += rollouts.start(first, dtype, numerics) + verifiers.start(graders(problems))
    gather([*calls, *(environments.ready() if environments else [])])
    for model in (policy, *others.values()):
        model.check_agreement()
    rollouts.check_agreement()
    verifiers.check_agreement()
    if environments:
        environments.check_agreement()
    policy.call(ModelWorker.open_checkpoints, plan.checkpoints, plan.checkpoint_config)
    for name, model in actors.learners.items():
        model.call(ModelWorker.open_checkpoints, plan.checkpoints_of(name), plan.checkpoint_config)


def graders(problems: Sequence[ProblemSet]) -> list[str]:
    """Names of the graders that a run's problems need."""
    programs = [PROGRAMS for each in problems if each.split.has_programs]
    return list(dict.fromkeys([*programs, *(each.config.grader for each in problems if each.split.has_answers)]))


def _environments(recipe: Recipe, first: Storage, placement: Placement) -> EnvironmentGroup | None:
    """The environments that answer the policy's turns, where the recipe has them."""
    if recipe.environment.kind == "none":
        return None
    files = Tokenizer(Checkpoint(first).files).files
    task = recipe.mixture[0]
    return EnvironmentGroup(
        recipe.environment,
        files,
        chat=task.chat,
        chat_template_kwargs=task.chat_template_kwargs,
        places=placement.of("environment"),
    )


def _model(role: ModelRole, plan: RunPlan, placement: Placement) -> ModelGroup:
    """The processes of the policy, or of a model beside it."""
    return ModelGroup(role.layout, trainer=plan.recipe.trainer, places=placement.of(role.name), role=role.name)


def _loading(role: ModelRole, model: ModelGroup, recipe: Recipe, weights: Path | Storage) -> list[Call[None]]:
    """Calls that load a model beside the policy, to be gathered."""
    dtype, numerics = recipe.model.dtype, recipe.model.numerics
    return model.start(weights, dtype, role.optimizer, role.temperature, numerics, role.head)


def _first_weights(name: str, run: CheckedRun, first: Storage) -> Path | Storage:
    """The weights that a model beside the policy begins with: the policy's, or its own, converted into the run."""
    if name not in run.scorers:
        return first
    opened = run.scorers[name]
    folder = run.plan.recipe.folder / name
    return write_checkpoint(opened.source, opened.config, opened.files, folder).resolve()
