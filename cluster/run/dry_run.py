"""Checks all that a run can be refused for before its first step, without a cluster; nothing is written."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lockstep.cluster.launch.preflight import CheckedRun, check, check_llm_judge, check_rows, check_sandbox
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.schema import Recipe
from lockstep.cluster.run.beginning import Beginning, prepare
from lockstep.data.tasks.difficulty.curriculum import check_curriculum
from lockstep.data.tasks.mixture import ProblemSet, curriculum_of, problem_sets
from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.task import Split
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.algorithms.preferences import read_comparisons
from lockstep.rl.algorithms.supervised import read_conversations, split_conversations
from lockstep.rl.environments.factory import told
from lockstep.rl.prompts import make_prompt

SIDES = ("train", "held_out")


@dataclass(frozen=True)
class ReadyRun:
    """A run that has passed the checks of its driver, and may be given processes."""

    checked: CheckedRun
    beginning: Beginning
    problems: tuple[ProblemSet, ...]
    """Of each task; none where it trains on text."""

    def __str__(self) -> str:
        """Who would work, and on what, in one line."""
        plan, last = self.checked.plan, self.beginning.last
        train, held_out = (sum(len(getattr(each.split, side)) for each in self.problems) for side in SIDES)
        who = ", ".join(f"{count} {role}" for role, count in plan.processes.items())
        what = f", on {train} problems and {held_out} held-out ones" if self.problems else ""
        return f"with processes {who}{what}, into {plan.recipe.folder}{f', after {last.place}' if last else ''}"


def make_ready(recipe: Recipe, say: Callable[[str], None], *, resume: bool = False) -> ReadyRun:
    """Check a recipe as far as every run does before it has processes.

    Args:
        say: takes sentences on what was found.
        resume: whether the run is to go on from its last checkpoint.

    Raises:
        ValueError: one sentence on what does not fit.
    """
    checked = check(recipe)
    beginning = prepare(checked, say, resume=resume)
    if beginning.last is None:
        check_rows(recipe)
    problems = () if recipe.pretrain else problem_sets(recipe.mixture, recipe.seed, recipe.evaluation.tasks)
    for each in problems:
        if each.split.filtered:
            say(f"{each.name}: {each.split.filtered}" if each.name else each.split.filtered)
    if rl := recipe.rl:
        check_curriculum(curriculum_of(problems, recipe.seed, "rl", rl.prompts_per_step, rl.steps), rl.steps)
    if any(each.split.has_programs for each in problems):
        say(check_sandbox(recipe.verifier.sandbox))
    if recipe.verifier.llm_judge:
        say(check_llm_judge(recipe.verifier.llm_judge))
    return ReadyRun(checked, beginning, problems)


def dry_run(recipe: Recipe, say: Callable[[str], None], *, resume: bool = False) -> ReadyRun:
    """Check a recipe as `make_ready`, and what a run would find when it has processes: prompts and rows of files.

    Raises:
        ValueError: one sentence on what does not fit.
    """
    ready = make_ready(recipe, say, resume=resume)
    if ready.problems:
        tokenizer = Tokenizer(ready.checked.start.files, recipe.mixture[0].chat_template_kwargs)
        context = ready.checked.start.config.context
        for each in ready.problems:
            own = tokenizer.with_template_kwargs(each.config.chat_template_kwargs)
            _check_prompts(recipe, each, own, context)
        if recipe.supervised and recipe.supervised.source:
            found = read_conversations(recipe.supervised, tokenizer, context, say)
            split_conversations(found, recipe.supervised.held_out, recipe.seed)
        if recipe.preference and recipe.preference.source:
            read_comparisons(recipe.preference, tokenizer, say)
    return ready


def _check_prompts(recipe: Recipe, task: ProblemSet, tokenizer: Tokenizer, context: int) -> None:
    """Whether prompts can be made of all problems, and leave room for completions."""
    length, rules = min(recipe.rollout.length, context), told(recipe.environment)
    for key, new, problems in _completions(recipe, task.split):
        prompts = [make_prompt(each, task.config, tokenizer, task.split.shots, rules) for each in problems]
        longest = max(len(prompt.tokens) for prompt in prompts)
        if longest + new > length:
            limit = "rollout.length" if recipe.rollout.length <= context else "the model's context"
            raise RecipeError(
                f"the longest prompt has {longest} tokens, and with {key}={new} it needs {longest + new}, where "
                f"{limit} is {length}: lower {key}{', or raise rollout.length' if length < context else ''}"
            )


def _completions(recipe: Recipe, split: Split) -> Iterator[tuple[str, int, Sequence[Problem]]]:
    """Of each kind of completions that a run draws: the key of its bound, the bound, and the problems."""
    yield "evaluation.max_new_tokens", recipe.evaluation.max_new_tokens, split.held_out
    if not split.train:
        return
    if recipe.rl and recipe.rl.steps:
        yield "rl.sampling.max_new_tokens", recipe.rl.sampling.longest, split.train
    if recipe.preference and recipe.preference.steps and not recipe.preference.source:
        yield "preference.sampling.max_new_tokens", recipe.preference.sampling.longest, split.train
