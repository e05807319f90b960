"""RunPlan: what a recipe implies for a run, derived once: models, layouts, processes, optimizers, checkpoints.

Preflight makes it, and launch and run read it: nobody else asks a recipe which roles it has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lockstep.cluster.launch.data_digests import data_digests
from lockstep.cluster.recipe.roles import ScorerConfig
from lockstep.cluster.recipe.schema import Recipe
from lockstep.distributed.checkpoint.saver import CheckpointConfig
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.layout import Layout
from lockstep.model.config import Head
from lockstep.model.training.config import OptimizerConfig


@dataclass(frozen=True)
class ModelRole:
    """A model that takes part in training: the policy, or the critic, reference, reward model or teacher beside it."""

    name: str
    layout: Layout
    optimizer: OptimizerConfig | None = None
    """Of a model that is trained; None for one that only scores."""
    temperature: float = 1.0
    """That logits are divided by before log-probabilities are taken."""
    head: Head | None = None
    """In place of the head that its first weights have; None to leave it."""
    source: str = ""
    """Path or name of the model that its first weights come from; empty for the policy's."""


@dataclass(frozen=True)
class RunPlan:
    """Models, processes and checkpoints of a run, as its recipe implies them."""

    recipe: Recipe
    policy: ModelRole
    models: Mapping[str, ModelRole]
    """The models beside the policy that have processes of their own, by role."""

    @classmethod
    def of(cls, recipe: Recipe) -> "RunPlan":
        """The plan of a recipe; opens no files, which `data` does."""
        temperature = _temperature(recipe)
        policy = ModelRole("policy", recipe.layout, _policy_optimizer(recipe), temperature)
        return cls(recipe, policy, {role.name: role for role in _models(recipe, temperature)})

    @cached_property
    def processes(self) -> Mapping[str, int]:
        """Processes of each role, the policy first."""
        recipe, policy = self.recipe, {"policy": self.policy.layout.processes}
        if recipe.pretrain:
            return policy
        workers = {"rollout": recipe.rollout.workers * recipe.rollout.tensor, "verifier": recipe.verifier.workers}
        if recipe.environment.kind != "none":
            workers["environment"] = recipe.environment.workers
        return policy | workers | {name: role.layout.processes for name, role in self.models.items()}

    def has_model(self, role: str) -> bool:
        """Whether the processes of a role have a model, or a part of one."""
        return role not in ("verifier", "environment")

    def computing_with(self, role: str) -> tuple[str, ...]:
        """Roles whose processes compute while those of a role do, its own among them.

        CPU threads are shared out over them: with more, threads that wait take the time of those that work.
        """
        training = tuple(name for name in self.processes if name != "rollout" and self.has_model(name))
        if self._overlaps:
            return (*training, "rollout")
        return (role,) if role == "rollout" else training

    def tensor_degree(self, role: str) -> int:
        """Processes of a role that work on one layer at a time, and are to be on one host."""
        if role == "policy":
            return self.policy.layout.tensor
        if role in self.models:
            return self.models[role].layout.tensor
        return self.recipe.rollout.tensor if role == "rollout" else 1

    @cached_property
    def trained_models(self) -> tuple[str, ...]:
        """Roles beside the policy that are trained, and have checkpoints of their own."""
        return tuple(name for name, role in self.models.items() if role.optimizer)

    @cached_property
    def checkpoints(self) -> Storage:
        """Where the policy's checkpoints go."""
        return self.recipe.saves

    def checkpoints_of(self, role: str) -> Storage:
        """Where the checkpoints of a role beside the policy go, those of the fixed reference included."""
        return self.checkpoints / role

    @cached_property
    def checkpoint_config(self) -> CheckpointConfig:
        """When to save and how many to keep: one more than the recipe says where several models are trained.

        A crash may come between their checkpoints of one step; then all have those of the step before.
        """
        config = self.recipe.checkpoints
        if not self.trained_models:
            return config
        return config.model_copy(update={"keep_last": config.keep_last and config.keep_last + 1})

    @cached_property
    def steps_before_rl(self) -> int:
        """Optimizer steps of the phases before RL."""
        return sum(phase.steps for phase in (self.recipe.supervised, self.recipe.preference) if phase)

    @cached_property
    def data(self) -> Mapping[str, str]:
        """Digests of the files that the run learns from, by key of the recipe, as they are when this is first asked."""
        return data_digests(self.recipe)

    def manifest(self, run: str | None) -> dict[str, Any]:
        """What the manifests of a run's checkpoints say of it, so that it can be recognised and gone on with.

        Args:
            run: the run's id.
        """
        recipe = self.recipe
        return {
            "run": run,
            "name": recipe.name,
            "seed": recipe.seed,
            "recipe": recipe.model_dump(mode="json"),
            "data": dict(self.data),
        }

    @property
    def _overlaps(self) -> bool:
        """Whether rollouts are generated while the policy is trained."""
        return self.recipe.rl is not None and self.recipe.rl.flow.mode != "synchronous"


def _models(recipe: Recipe, temperature: float) -> list[ModelRole]:
    """The models beside the policy."""
    roles, rl, found = recipe.roles, recipe.rl, list[ModelRole]()
    if rl and "value" in rl.scores:
        critic = roles.critic
        found.append(ModelRole("critic", critic.layout or recipe.layout, critic.optimizer, head="value"))
    if rl and rl.reference.kind != "none" and roles.reference.place == "apart":
        found.append(ModelRole("reference", roles.reference.layout or recipe.layout, temperature=temperature))
    if _trains_reward_model(recipe) or roles.reward.source:
        found.append(_reward_model(recipe, roles.reward))
    if roles.teacher.source:
        teacher = roles.teacher
        layout = teacher.layout or recipe.layout
        found.append(ModelRole("teacher", layout, temperature=temperature, source=teacher.source))
    return found


def _reward_model(recipe: Recipe, config: ScorerConfig) -> ModelRole:
    """A reward model that exists, or one that the preference phase trains."""
    layout = config.layout or recipe.layout
    if recipe.preference and _trains_reward_model(recipe):
        return ModelRole("reward", layout, recipe.preference.optimizer, head="value", source=config.source)
    return ModelRole("reward", layout, source=config.source)


def _trains_reward_model(recipe: Recipe) -> bool:
    return recipe.preference is not None and recipe.preference.judged


def _policy_optimizer(recipe: Recipe) -> OptimizerConfig:
    """That of the last phase which trains the policy."""
    if recipe.pretrain:
        return recipe.pretrain.optimizer
    phase = recipe.rl or (None if _trains_reward_model(recipe) else recipe.preference) or recipe.supervised
    return phase.optimizer if phase else OptimizerConfig()


def _temperature(recipe: Recipe) -> float:
    """That rollouts are sampled with; 1 where they are greedy, and without RL."""
    return (recipe.rl.sampling.temperature if recipe.rl else 1.0) or 1.0
