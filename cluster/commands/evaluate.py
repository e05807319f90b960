"""The command `lockstep eval`: accuracy and pass@k of a model on held-out problems, with confidence intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cluster.commands.console import err, out, progress, sentences
from lockstep.cluster.commands.options import CacheGib, Checkpoint, Dtype, overriding

if TYPE_CHECKING:
    from lockstep.cluster.recipe.schema import Recipe

KNOWN_TOKENS = 512
"""Of an answer to a known data set's problem, unless it is said."""
EVERYTHING = 1 << 31


@sentences
def evaluate_model(
    checkpoint: Checkpoint,
    task: Annotated[
        str | None, typer.Option(help="A known data set, a recipe, a reasoning-gym data set, or problem files.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="Problems to answer, all of them: a file, a folder, or hf://datasets/….")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Problems at most.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Completions of each to draw, beside the greedy one.")] = 0,
    k: Annotated[
        list[int] | None, typer.Option("--k", min=1, help="Estimate pass@k; may be repeated. 1 and all samples.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the samples.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"As the recipe says; {KNOWN_TOKENS} for a known data set.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The folder to leave; runs/eval/… otherwise.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that judge, if not the recipe's.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the task, as in --set task.shots=4.")
    ] = None,
    dtype: Dtype = "bfloat16",
    cache_gib: CacheGib = 1.0,
) -> None:
    """Answer held-out problems: greedy accuracy and pass@k, with 95% intervals. Killed, the same command goes on.

    Example: lockstep eval runs/quickstart --task recipes/quickstart.toml
    """
    from lockstep.cluster.evaluation.answer_folder import OtherSettings
    from lockstep.cluster.evaluation.evaluate import Evaluation, evaluate_checkpoint
    from lockstep.cluster.generation import sampling_of
    from lockstep.rl.sandbox.isolation import SandboxError

    if not (named := task or file):
        raise ValueError("what to answer is missing: give --task or --file")
    with overriding():
        recipe = _recipe(named, file, limit, overrides or [])
    ks = tuple(sorted(set(k or ({1, samples} if samples else ()))))
    if any(each > samples for each in ks):
        raise ValueError(f"pass@{ks[-1]} needs {ks[-1]} samples or more, and these are {samples}: raise --samples")
    longest = max_new_tokens or recipe.evaluation.max_new_tokens
    stop = tuple(recipe.task.stop)
    sampling = sampling_of(temperature=temperature, top_p=top_p, max_new_tokens=longest, stop=stop)
    verifier = recipe.verifier.model_copy(update={"processes": workers} if workers else {})
    work = Evaluation(checkpoint, recipe.task, recipe.seed, sampling, verifier, samples, ks, dtype, cache_gib)
    folder = output or _folder(checkpoint, *filter(None, (task, file)))
    try:
        with progress("answering") as advance:
            findings = evaluate_checkpoint(work, folder, advance, err.print)
    except OtherSettings as error:
        raise ValueError(f"{error} with --output") from error
    except SandboxError as error:
        raise ValueError(str(error)) from error
    for line in findings.lines:
        out.print(line, highlight=False)
    out.print(f"completions and verdicts: {folder}", highlight=False)


def _recipe(task: str, file: str | None, limit: int | None, overrides: Sequence[str]) -> "Recipe":
    """The task as a recipe has it, with the seed and what evaluations take from there."""
    from reasoning_gym.factory import DATASETS

    from lockstep.cluster.recipe.catalog import shipped_recipes
    from lockstep.cluster.recipe.load import load_recipe, parse
    from lockstep.data.row_reader import is_source
    from lockstep.data.tasks.presets import PRESETS

    given = [] if file is None else [f"task.held_out_from={file}", f"task.held_out={EVERYTHING}"]
    given += [] if limit is None else [f"task.held_out={limit}"]
    given += overrides
    if task.endswith(".toml") or task in shipped_recipes():
        return load_recipe(task, given)
    if task in PRESETS:
        return parse({"task": {"preset": task}, "evaluation": {"max_new_tokens": KNOWN_TOKENS}}, given)
    if not is_source(task) and task not in DATASETS:
        raise ValueError(
            f"--task {task!r} is not known: give {', '.join(PRESETS)}, a recipe.toml, a data set of reasoning-gym, or "
            "files of problems"
        )
    return parse({"task": {"generator": task}}, given)


def _folder(checkpoint: str, *names: str) -> Path:
    parts = [Path(checkpoint).resolve().name, *(Path(name).name.split(".")[0] for name in names)]
    return Path("runs") / "eval" / "-".join(parts)
