"""The commands `lockstep eval` (accuracy and pass@k on held-out problems), `lockstep study`, and `lockstep grade`."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lockstep.cluster.commands.console import err, opened_input, out, progress, sentences
from lockstep.cluster.commands.options import CacheGib, Checkpoint, Dtype, overriding

if TYPE_CHECKING:
    from lockstep.cluster.evaluation.evaluate import Evaluation, Findings
    from lockstep.cluster.evaluation.grading import Task
    from lockstep.cluster.evaluation.studies.runner import Row
    from lockstep.cluster.evaluation.studies.study import Study, Workload
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
    name: Annotated[str | None, typer.Option(help="Of the task, where the recipe has several.")] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Answer the training problems, for task.pass_rates; needs --samples.")
    ] = False,
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
    from lockstep.cluster.evaluation.evaluate import Evaluation
    from lockstep.cluster.generation import sampling_of
    from lockstep.cluster.launch.preflight import check_llm_judge
    from lockstep.data.tasks.user_function import LLM_JUDGE

    _check_options(task, file, samples, train=train)
    with overriding():
        recipe = _recipe(task or str(file), name, [*_problems(file, limit, train=train), *(overrides or [])])
    ks = _ks(k, samples)
    longest = max_new_tokens or recipe.evaluation.max_new_tokens
    stop = tuple(recipe.task.stop)
    sampling = sampling_of(temperature=temperature, top_p=top_p, max_new_tokens=longest, stop=stop)
    verifier = recipe.verifier.model_copy(update={"processes": workers} if workers else {})
    if verifier.llm_judge and recipe.task.grader == LLM_JUDGE:
        err.print(check_llm_judge(verifier.llm_judge), highlight=False)
    work = Evaluation(checkpoint, recipe.task, recipe.seed, sampling, verifier, samples, ks, dtype, cache_gib, train)
    folder = output or _folder(checkpoint, *filter(None, (task, file, name, "train" if train else None)))
    for line in _findings(work, folder).lines:
        out.print(line, highlight=False)
    out.print(f"completions and verdicts: {folder}", highlight=False)


def _findings(work: "Evaluation", folder: Path) -> "Findings":
    from lockstep.cluster.evaluation.answer_folder import OtherSettings
    from lockstep.cluster.evaluation.evaluate import evaluate_checkpoint
    from lockstep.rl.sandbox.isolation import SandboxError

    try:
        with progress("answering") as advance:
            return evaluate_checkpoint(work, folder, advance, err.print)
    except OtherSettings as error:
        raise ValueError(f"{error} with --output") from error
    except SandboxError as error:
        raise ValueError(str(error)) from error


def _check_options(task: str | None, file: str | None, samples: int, *, train: bool) -> None:
    """Raise ValueError where options do not go together."""
    if not task and not file:
        raise ValueError("what to answer is missing: give --task or --file")
    if train and file:
        raise ValueError("--train answers the training problems of a task, and --file names others: give one of them")
    if train and not samples:
        raise ValueError("--train measures pass rates, which are of samples: give --samples 8, for example")


def _ks(given: list[int] | None, samples: int) -> tuple[int, ...]:
    """The values of k for pass@k. Raises ValueError where there are fewer samples."""
    ks = tuple(sorted(set(given or ({1, samples} if samples else ()))))
    if any(each > samples for each in ks):
        raise ValueError(f"pass@{ks[-1]} needs {ks[-1]} samples or more, and these are {samples}: raise --samples")
    return ks


def _problems(file: str | None, limit: int | None, *, train: bool) -> list[str]:
    """Overrides of the task that say which problems are answered, and how many."""
    given = [] if file is None else [f"task.held_out_from={file}", f"task.held_out={EVERYTHING}"]
    return given if limit is None else [*given, f"task.{'train' if train else 'held_out'}={limit}"]


def _recipe(task: str, name: str | None, given: Sequence[str]) -> "Recipe":
    """The task as a recipe has it, with the seed and what evaluations take from there.

    Args:
        name: of one of a recipe's tasks.
        given: overrides.
    """
    from reasoning_gym.factory import DATASETS

    from lockstep.cluster.recipe.catalog import shipped_recipes
    from lockstep.cluster.recipe.load import load_recipe, parse
    from lockstep.data.row_reader import is_source
    from lockstep.data.tasks.presets import PRESETS

    if task.endswith(".toml") or task in shipped_recipes():
        recipe = load_recipe(task)
        if recipe.tasks or (name and recipe.evaluation.tasks):
            return parse(_one_task(recipe, task, name), given)
    if name:
        raise ValueError(f"--name {name} is of a recipe with several tasks, which {task} is not: leave it out")
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


def _one_task(recipe: "Recipe", file: str, name: str | None) -> dict[str, Any]:
    """A mixture's values with one of its tasks in the place of all."""
    tasks = {each.name: each for each in (*recipe.tasks, *recipe.evaluation.tasks)}
    if name not in tasks:
        raise ValueError(f"{file} is a mixture of {len(tasks)} tasks: give --name with one of {', '.join(tasks)}")
    values = recipe.model_dump(mode="json", exclude_unset=True, include={"seed", "verifier"})
    values["evaluation"] = {"max_new_tokens": recipe.evaluation.max_new_tokens}
    task = tasks[name].model_dump(mode="json", exclude_unset=True, exclude={"name", "weight", "curriculum", "reward"})
    return values | {"task": task}


def _folder(checkpoint: str, *names: str) -> Path:
    parts = [Path(checkpoint).resolve().name, *(Path(name).name.split(".")[0] for name in names)]
    return Path("runs") / "eval" / "-".join(parts)


@sentences
def run_study(
    name: Annotated[str, typer.Argument(help="Of the study: see --list.")] = "",
    checkpoints: Annotated[list[str] | None, typer.Argument(help="Models to measure, side by side.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Name all studies.")] = False,
    given: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, as in --set temperature=0.5,1; may be repeated.")
    ] = None,
    task: Annotated[str, typer.Option(help="Of a study on problems: see lockstep eval.")] = "quickstart",
    file: Annotated[str | None, typer.Option(help="Problems of a file in the place of a task's.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="The folder to leave; runs/study/NAME otherwise.")
    ] = None,
    dtype: Dtype = "bfloat16",
    cache_gib: CacheGib = 1.0,
) -> None:
    """Measure models, with 95% intervals over seeds: JSON lines, a table and plots. Interrupted, it goes on.

    Example: lockstep study generation runs/quickstart --set temperature=0.3,1.0
    """
    from lockstep.cluster.evaluation.studies import registry, runner

    if listed:
        for each in registry.study_names():
            out.print(f"{each:<12}{registry.summary_of(each)}", highlight=False)
        return
    study = registry.study_of(name)
    if not checkpoints:
        raise ValueError(f"a study measures models: give one or more checkpoints, as in lockstep study {name} runs/a")
    settings = registry.settings_of(study, _pairs(given or ()))
    workload = _workload(task, file) if study.needs_problems else None
    work = runner.Work(name, study, settings, tuple(checkpoints), dtype, cache_gib, workload)
    folder = folder or Path("runs") / "study" / name
    with progress("measuring") as advance:
        measured = runner.run_study(work, folder, advance)
    rows = runner.table_rows(study, measured)
    table = runner.markdown(study, rows)
    (folder / "table.md").write_text(table, encoding="utf-8")
    _draw(study, rows, folder)
    out.print(table, highlight=False)
    out.print(f"measurements, table and plots: {folder}", highlight=False)


def _pairs(given: Sequence[str]) -> dict[str, str]:
    """Settings as they were given; raises ValueError for one that is no pair."""
    for each in given:
        if "=" not in each:
            raise ValueError(f"--set {each} sets nothing: give key=value, as in --set seeds=5")
    return dict(each.split("=", 1) for each in given)


def _workload(task: str, file: str | None) -> "Workload":
    from lockstep.cluster.evaluation.studies.study import Workload

    recipe = _recipe(file or task, None, _problems(file, None, train=False))
    return Workload(recipe.task, recipe.seed, recipe.verifier)


def _draw(study: "Study", rows: "Sequence[Row]", folder: Path) -> None:
    """Write a plot of each measure over the study's axis, with a line for each checkpoint."""
    from lockstep.cluster.records.svg import Point, interval_chart, standalone

    for measure, unit in study.units.items():
        lines: dict[str, list[Point]] = {}
        for row in rows:
            if row.measure == measure and row.place is not None:
                point = Point(row.place, row.interval.mean, row.interval.low, row.interval.high)
                lines.setdefault(row.checkpoint, []).append(point)
        if lines:
            svg = interval_chart(measure, lines, study.axis, f"{measure}, {unit}" if unit else measure)
            name = re.sub(r"[^\w-]+", "-", measure)
            (folder / f"{name}.svg").write_text(standalone(svg), encoding="utf-8")


@sentences
def grade_answers(
    answers: Annotated[str, typer.Argument(help="JSON lines; - for stdin.")],
    task: Annotated[str, typer.Option(help="math, code or gym.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core otherwise.")] = None,
    deadline: Annotated[float, typer.Option(min=0.01, help="Seconds that one answer may take.")] = 5.0,
    audit: Annotated[
        bool, typer.Option("--audit", help="Math: say what each rule of extraction finds, and where they disagree.")
    ] = False,
) -> None:
    """Print a verdict for each row, as JSON lines; the exit code is 1 where a row could not be read.

    Rows have the fields response and answer; for code completion, tests and, where a function is tested, entry_point.

    Example: lockstep grade --task math answers.jsonl
    """
    from lockstep.cluster.evaluation.grading import (
        Graded,
        audit_summary,
        auditor,
        grade_rows,
        pool_for,
        read_rows,
        summary,
    )

    chosen = _grader(task, audit=audit)
    processes = workers or os.cpu_count() or 1
    outcomes, bad, audited = Counter[str](), 0, list[Graded]()
    with ExitStack() as stack:
        lines = stack.enter_context(opened_input(answers))
        pool = stack.enter_context(pool_for(chosen, processes, deadline, err.print))
        finish = stack.enter_context(auditor(processes, deadline)) if audit else Graded
        rows = read_rows(lines, "stdin" if answers == "-" else answers, chosen)
        for graded in grade_rows(rows, pool, processes, finish):
            print(graded.as_json(audit=audit), flush=True)
            outcomes[graded.verdict.outcome] += 1
            if graded.row.problem:
                bad += 1
                err.print(graded.row.problem)
            if audit:
                audited.append(graded)
    for line in (summary(outcomes, bad), *(audit_summary(audited) if audit else ())):
        err.print(line)
    if bad:
        raise typer.Exit(1)


def _grader(name: str, *, audit: bool) -> "Task":
    if audit and name != "math":
        raise ValueError(f"--audit compares rules that find a final answer, which --task {name} has none of: use math")
    match name:
        case "math" | "code" | "gym":
            return name
        case _:
            raise ValueError(f"--task {name!r} is not supported: use math, code or gym")
