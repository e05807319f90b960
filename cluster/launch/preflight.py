"""What cannot run is refused before anything is written."""

from lockstep.cluster.launch.plan import models, scorer_source
from lockstep.cluster.launch.resume import continued, continued_text, newest
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.model_source import starting_point
from lockstep.cluster.recipe.roles import ScorerConfig
from lockstep.cluster.recipe.schema import Recipe
from lockstep.data.corpus.loader import PretrainingData
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.layout import Layout
from lockstep.model.config import ModelConfig, check_layout, check_numerics
from lockstep.model.formats.registry import ModelContents
from lockstep.model.weights.lora import with_adapters
from lockstep.rl.sandbox.isolation import SandboxError
from lockstep.rl.verifiers.code_pool import CodePool
from lockstep.rl.verifiers.config import SandboxConfig


def check(recipe: Recipe) -> ModelContents:
    """The model that a recipe starts from.

    Refuses, before anything is written, a layout that the model does not divide by or that has no exact numerics where
    they are asked for, and text that cannot be read.

    Raises:
        ValueError: one sentence on what does not fit.
    """
    start = starting_point(recipe.model, recipe.seed)
    model, source = with_adapters(start.config, start.source, recipe.trainer.trainable.lora, recipe.seed)
    recipe.trainer.trainable.check(model)
    check_layout(recipe.layout, model)
    check_layout(Layout(tensor=recipe.rollout.tensor), model)
    check_numerics(recipe.model.numerics, recipe.layout, model)
    for name, beside in models(recipe).items():
        other = scorer_source(name, recipe).config if isinstance(beside, ScorerConfig) and beside.source else model
        check_layout(beside.layout or recipe.layout, other)
        if other.vocabulary != model.vocabulary:
            raise RecipeError(
                f"roles.{name}.source reads {other.vocabulary} tokens and the policy writes {model.vocabulary}: "
                "give a model with the same tokenizer"
            )
    if recipe.rl and recipe.roles.reference.place == "apart" and recipe.rl.reference.moves:
        raise RecipeError("a reference that moves is in the policy's own processes: place it together")
    if recipe.pretrain and recipe.pretrain.data:
        if recipe.pretrain.data.length > model.context:
            raise RecipeError(
                f"pretrain.data.length={recipe.pretrain.data.length} is longer than the model's context of "
                f"{model.context} tokens: shorten it, or give a model with a longer context"
            )
        tokenizer = Tokenizer(start.files).digest if start.files else None
        PretrainingData(recipe.pretrain.data, seed=recipe.seed, vocabulary=model.vocabulary, tokenizer=tokenizer)
    return ModelContents(source, model, start.files)


def check_sandbox(config: SandboxConfig) -> str:
    """What keeps programs in on this machine, in one line.

    Raises:
        ValueError: where that is less than the recipe requires.
    """
    try:
        with CodePool(1, config.limits, config.required) as sandboxes:
            return str(sandboxes.protection)
    except SandboxError as error:
        raise RecipeError(f"verifier.sandbox.requires={list(config.requires)}: {error}") from error


def last_checkpoint(recipe: Recipe, model: ModelConfig) -> manager.Checkpoint | None:
    """What a run goes on from, or None where it has saved nothing.

    Raises:
        RecipeError: when the recipe is not one that can go on from there.
    """
    if not manager.saved(recipe.saves):
        return None
    last = manager.Checkpoint(recipe.saves) if recipe.pretrain else newest(recipe)
    expected = [("model", "model", model), ("seed", "seed", recipe.seed)]
    expected += continued_text(recipe.pretrain) if recipe.pretrain else continued(recipe)
    for key, name, here in expected:
        there = ModelConfig(**last.manifest["model"]) if key == "model" else last.manifest.get(key)
        if there != here:
            raise RecipeError(
                f"{last.place} was saved with {name}={there}, and the recipe says {here}: make them equal"
            )
    if not last.states:
        raise RecipeError(
            f"{last.place} holds no state of the optimizer, which a run needs to go on: save with checkpoints.every"
        )
    return last
