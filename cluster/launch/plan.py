"""Who takes part in a run: the processes of each role, and the models beside the policy."""

from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.roles import CriticConfig, ReferenceRoleConfig, ScorerConfig
from lockstep.cluster.recipe.schema import Recipe
from lockstep.model.formats.registry import OpenModel, open_model
from lockstep.model.training.config import OptimizerConfig

Beside = CriticConfig | ScorerConfig | ReferenceRoleConfig
"""What a recipe says of a model beside the policy."""


def processes(recipe: Recipe) -> dict[str, int]:
    """Processes of each role."""
    policy = {"policy": recipe.layout.processes}
    if recipe.pretrain:
        return policy
    roles = {"rollout": recipe.rollout.workers * recipe.rollout.tensor, "verifier": recipe.verifier.workers}
    return (
        policy | roles | {name: (beside.layout or recipe.layout).processes for name, beside in models(recipe).items()}
    )


def busy(recipe: Recipe) -> tuple[int, int]:
    """Processes that work while a rollout worker writes, and while the policy learns; those of models count as its own.

    Threads are shared out over so many: with more, the threads that wait take the time of those that work.
    """
    count = processes(recipe)
    writing, learning = count["rollout"], sum(count[name] for name in ("policy", *models(recipe)))
    if recipe.rl and recipe.rl.flow.mode != "synchronous":
        return writing + learning, writing + learning
    return writing, learning


def models(recipe: Recipe) -> dict[str, Beside]:
    """The models that a recipe has beside the policy."""
    found: dict[str, Beside] = {}
    if recipe.rl and "value" in recipe.rl.scores:
        found["critic"] = recipe.roles.critic
    if recipe.rl and recipe.rl.reference.kind != "none" and recipe.roles.reference.place == "apart":
        found["reference"] = recipe.roles.reference
    for name in ("reward", "teacher"):
        scorer: ScorerConfig = getattr(recipe.roles, name)
        if scorer.source or name in learned(recipe):
            found[name] = scorer
    return found


def learned(recipe: Recipe) -> set[str]:
    """The models that are trained by preferences, and not only asked."""
    return {"reward"} if recipe.preference and recipe.preference.judged else set()


def scorer_source(name: str, recipe: Recipe) -> OpenModel:
    """The model of a role that scores.

    Raises:
        ValueError: when it is not of the kind that the role needs.
    """
    source: str = getattr(recipe.roles, name).source
    found = open_model(source)
    wanted = "value" if name == "reward" else "vocabulary"
    if found.config.head != wanted and name not in learned(recipe):
        raise RecipeError(
            f"roles.{name}.source={source} has a {found.config.head} head, and that role needs a {wanted} head"
        )
    return found


def temperature(recipe: Recipe) -> float:
    """That rollouts are drawn with."""
    return (recipe.rl.sampling.temperature if recipe.rl else 1.0) or 1.0


def optimizer(recipe: Recipe) -> OptimizerConfig:
    phase = recipe.rl or (None if learned(recipe) else recipe.preference) or recipe.supervised
    return phase.optimizer if phase else OptimizerConfig()
