"""Checks a run before anything is written: models are opened, and layouts, roles, data and checkpoints must fit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lockstep.cluster.launch.plan import ModelRole, RunPlan
from lockstep.cluster.launch.resume import check_changes, newest
from lockstep.cluster.launch.run_lock import is_inside
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.model_source import starting_point
from lockstep.cluster.recipe.paths import functions
from lockstep.cluster.recipe.schema import Recipe
from lockstep.data.corpus.loader import PretrainingData
from lockstep.data.row_reader import read_rows
from lockstep.data.tasks.difficulty.curriculum import WEIGHED_BY
from lockstep.data.tasks.own_problems import FILTERED_BY
from lockstep.data.tasks.user_function import BadFunction
from lockstep.data.tasks.user_function import check as check_function
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint import manager
from lockstep.distributed.layout import Layout
from lockstep.model.config import ModelConfig, check_layout, check_numerics
from lockstep.model.formats.huggingface.tensor_names import stored_names
from lockstep.model.formats.registry import ModelContents, OpenModel, open_model
from lockstep.model.training.config import PretrainConfig
from lockstep.model.weights.lora import with_adapters
from lockstep.rl.rollout.config import check_recordable
from lockstep.rl.rollout.vllm.interpreter import check_interpreter
from lockstep.rl.sandbox.distributions import LibraryError
from lockstep.rl.sandbox.isolation import SandboxError
from lockstep.rl.verifiers.code_pool import CodePool
from lockstep.rl.verifiers.config import SandboxConfig
from lockstep.rl.verifiers.llm_judge.client import EndpointError
from lockstep.rl.verifiers.llm_judge.config import LLMJudgeConfig
from lockstep.rl.verifiers.llm_judge.grader import trial
from lockstep.rl.verifiers.user_functions import OFFERED


@dataclass(frozen=True)
class CheckedRun:
    """A run that passed all checks: its plan, and the models whose weights it starts from, each opened once."""

    plan: RunPlan
    start: ModelContents
    """The policy's first weights, adapters included."""
    scorers: Mapping[str, OpenModel]
    """By role, the models beside the policy that come from a checkpoint of their own."""


def check(recipe: Recipe) -> CheckedRun:
    """Open the models of a recipe and check that its layouts, numerics, roles and data fit them; writes nothing.

    Raises:
        ValueError: one sentence on what does not fit.
    """
    plan, start = RunPlan.of(recipe), starting_point(recipe.model, recipe.seed)
    config, source = with_adapters(start.config, start.source, recipe.trainer.trainable.lora, recipe.seed)
    start = ModelContents(source, config, start.files)
    recipe.trainer.trainable.check(config)
    check_layout(recipe.layout, config)
    check_layout(Layout(tensor=recipe.rollout.tensor), config)
    if recipe.rollout.engine == "vllm":
        check_interpreter(Path(recipe.rollout.python))
        stored_names(config)
    if recipe.rollout.replay_routing:
        check_recordable(config)
    check_numerics(recipe.model.numerics, recipe.layout, config)
    scorers = {name: _open_scorer(role) for name, role in plan.models.items() if role.source}
    for name, role in plan.models.items():
        _check_model(role, scorers[name].config if name in scorers else config, config)
    if recipe.rl and recipe.roles.reference.place == "apart" and recipe.rl.reference.moves:
        raise RecipeError("a reference that moves is in the policy's own processes: place it together")
    if recipe.pretrain:
        _check_text(recipe.pretrain, recipe.seed, start)
    if recipe.supervised and recipe.supervised.longest > config.context:
        raise RecipeError(
            f"supervised.longest={recipe.supervised.longest} is more than the model's context of {config.context} "
            "tokens: lower it, or give a model with a longer context"
        )
    _check_functions(recipe)
    return CheckedRun(plan, start, scorers)


def _open_scorer(role: ModelRole) -> OpenModel:
    """The model of a role that scores.

    Raises:
        ValueError: when it does not have the head that the role needs.
    """
    found = open_model(role.source)
    needed = "value" if role.name == "reward" else "vocabulary"
    if found.config.head != needed and not role.optimizer:
        raise RecipeError(
            f"roles.{role.name}.source={role.source} has a {found.config.head} head, and that role needs a "
            f"{needed} head"
        )
    return found


def _check_model(role: ModelRole, config: ModelConfig, policy: ModelConfig) -> None:
    """Whether a model beside the policy divides by its layout, and reads the policy's tokens."""
    check_layout(role.layout, config)
    if config.vocabulary != policy.vocabulary:
        raise RecipeError(
            f"roles.{role.name}.source reads {config.vocabulary} tokens and the policy writes {policy.vocabulary}: "
            "give a model with the same tokenizer"
        )


_ARGUMENTS = {
    ".grader": OFFERED,
    ".reward.functions": OFFERED,
    ".filter": FILTERED_BY,
    ".curriculum": WEIGHED_BY,
}
"""What functions of the user's are called with, by a part of their key; generators have arguments of their own."""


def _check_functions(recipe: Recipe) -> None:
    """Whether the functions that a recipe names can be loaded, and called with the arguments that there are."""
    for key, text in functions(recipe):
        try:
            check_function(text, next((given for part, given in _ARGUMENTS.items() if part in f".{key}"), ()))
        except BadFunction as error:
            raise RecipeError(f"{key}: {error}") from error


def _check_text(config: PretrainConfig, seed: int, start: ModelContents) -> None:
    """Whether text can be read, with the model's tokenizer and within its context; random documents always can."""
    if not config.data:
        return
    if config.data.length > start.config.context:
        raise RecipeError(
            f"pretrain.data.length={config.data.length} is longer than the model's context of "
            f"{start.config.context} tokens: shorten it, or give a model with a longer context"
        )
    tokenizer = Tokenizer(start.files).digest if start.files else None
    for data in filter(None, (config.training_data, config.old_data)):
        PretrainingData(data, seed=seed, vocabulary=start.config.vocabulary, tokenizer=tokenizer)


def check_rows(recipe: Recipe) -> None:
    """Whether the files of conversations and preferences that a new run learns from are there.

    Raises:
        BadRow: names one that cannot be read.
    """
    for phase in (recipe.supervised, recipe.preference):
        if phase and phase.steps and phase.source:
            next(read_rows(phase.source, on_bad=lambda error: None), None)


def check_sandbox(config: SandboxConfig) -> str:
    """Start a sandbox and return which isolation it has on this machine, in one line.

    Raises:
        ValueError: where that is less than the recipe requires, or a library for programs is not installed.
    """
    try:
        with CodePool(1, config.limits, config.required, libraries=config.libraries) as sandboxes:
            return str(sandboxes.isolation)
    except LibraryError as error:
        raise RecipeError(f"verifier.sandbox.libraries={list(config.libraries)}: {error}") from error
    except SandboxError as error:
        raise RecipeError(f"verifier.sandbox.requires={list(config.requires)}: {error}") from error


def check_llm_judge(config: LLMJudgeConfig) -> str:
    """Have an LLM judge score a right answer, and return what it said in one line.

    Raises:
        RecipeError: where its endpoint does not answer, or refuses the question.
    """
    try:
        return trial(config)
    except EndpointError as error:
        raise RecipeError(f"verifier.llm_judge: {error}") from error


def check_place(plan: RunPlan) -> None:
    """Whether a new run may save where its recipe says; a place inside of its folder moves aside with what is there.

    Raises:
        RecipeError: when another run's checkpoints lie there, which retention would take for this one's.
    """
    place = plan.checkpoints
    if is_inside(place, plan.recipe.folder) or not manager.saved(place):
        return
    found = manager.Checkpoint(place).manifest
    raise RecipeError(
        f"checkpoints.at={place} holds checkpoints of the run {found.get('name', 'of no name')} "
        f"(id {found.get('run', 'unknown')}): go on with it by --resume, or give this run a place of its own, as "
        "with {name} in checkpoints.at"
    )


def last_checkpoint(
    plan: RunPlan, model: ModelConfig, say: Callable[[str], object] = lambda sentence: None
) -> manager.Checkpoint | None:
    """The checkpoint that a run resumes from, or None where it has saved nothing; `say` takes what a user should know.

    Raises:
        RecipeError: when the recipe is not one that can resume from there.
    """
    last = newest(plan, say)
    if last is None:
        say(f"{plan.checkpoints} holds no checkpoint: the run begins with step 1")
        return None
    if (there := ModelConfig(**last.manifest["model"])) != model:
        raise RecipeError(f"{last.place} was saved with model={there}, and the recipe says {model}: make them equal")
    check_changes(plan, last)
    if not last.states:
        raise RecipeError(
            f"{last.place} holds no state of the optimizer, which a run needs to go on: save with checkpoints.every"
        )
    return last
