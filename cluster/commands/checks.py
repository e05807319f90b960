"""The commands `lockstep parity`, `lockstep mismatch` and `lockstep score`: what a trainer computes, as numbers."""

import json
import os
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cluster.commands.console import err, json_lines, opened_input, out, sentences
from lockstep.cluster.commands.options import Dtype, Overrides, RecipeName, check_choice, overriding

if TYPE_CHECKING:
    from lockstep.cluster.evaluation.scoring.score import Rolling
    from lockstep.cluster.evaluation.scoring.texts import Text
    from lockstep.model.config import Numerics


@sentences
def parity(
    recipe: RecipeName,
    layouts: Annotated[list[str], typer.Option("--layouts", help='A layout, as "tensor=2,zero=2"; more may follow.')],
    more: Annotated[list[str] | None, typer.Argument(metavar="[LAYOUT]...", help="More layouts.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to compare.")] = 20,
    overrides: Overrides = None,
) -> None:
    """Train in each layout and compare with one process; the exit code is 1 where a layout computes something else.

    The recipe is one that trains on text.

    Example: lockstep parity recipes/parity-tiny.toml --layouts "tensor=2,sequence=true" "pipeline=2,virtual=2"
    """
    from lockstep.cluster.checks.parity import compare, table
    from lockstep.cluster.recipe.load import load_recipe

    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the processes that are started
    with overriding():
        resolved = load_recipe(recipe, overrides or [])
    found = compare(resolved, [*layouts, *(more or [])], steps, err.print)
    out.print(table(found))
    if not found.holds:
        raise typer.Exit(1)


@sentences
def mismatch(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, a run, a Hugging Face folder or a .gguf file.")],
    numerics: Annotated[str, typer.Option(help="fast or exact.")] = "fast",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    tensor: Annotated[int, typer.Option(min=1, help="Tensor degree, of rollouts and training alike.")] = 1,
    prompts: Annotated[
        Path | None, typer.Option(help='A file of prompts, one a line, or JSON lines with a "prompt"; sums otherwise.')
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts at most.")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Compare the log-probabilities of rollouts with the trainer's; in exact numerics a differing bit is exit code 1.

    Example: lockstep mismatch runs/quickstart --numerics exact
    """
    from lockstep.cluster.checks.mismatch import Work, measure_mismatch, table
    from lockstep.rl.rollout.config import SamplingParams

    check_choice("--numerics", numerics, ("fast", "exact"))
    check_choice("--dtype", dtype, ("bfloat16", "float32"))
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the processes that are started
    sampling = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)
    chosen: Numerics = "exact" if numerics == "exact" else "fast"
    work = Work(sampling, dtype, chosen, tensor, prompts, count, samples, seed)
    found = measure_mismatch(checkpoint, work)
    if as_json:
        print(json.dumps(asdict(found) | {"numerics": numerics, "dtype": dtype, "tensor": tensor}))
    else:
        out.print(table(found, work))
    if numerics == "exact" and found.differing_bits:
        raise typer.Exit(1)


@sentences
def score(
    file: Annotated[
        str, typer.Argument(help="JSON lines with text, prompt and completion, or messages; a .txt; - for stdin.")
    ],
    model: Annotated[str, typer.Option(help="A checkpoint, a run, a Hugging Face folder or a .gguf file.")],
    output: Annotated[Path | None, typer.Option("--out", help="Write JSON lines here and not to stdout.")] = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="Each token with its log-probability.")] = False,
    window: Annotated[
        int | None, typer.Option(min=1, help="Score longer texts in rolling windows of so many tokens.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a window scores; half of the window otherwise.")
    ] = None,
    layout: Annotated[str, typer.Option(help='As "tensor=2,pipeline=2"; one process otherwise.')] = "",
    numerics: Annotated[str, typer.Option(help="fast or exact.")] = "fast",
    dtype: Dtype = "bfloat16",
) -> None:
    """Print log-probabilities, perplexity and bits a byte of given texts, as JSON lines; a summary goes to stderr.

    Example: lockstep score texts.jsonl --model runs/quickstart
    """
    check_choice("--numerics", numerics, ("fast", "exact"))
    check_choice("--dtype", dtype, ("bfloat16", "float32"))
    texts, rolling = _texts(file), _rolling(window, stride)

    from lockstep.cluster.evaluation.scoring.likelihood import Scoring
    from lockstep.cluster.evaluation.scoring.score import Totals, planned
    from lockstep.cluster.recipe.load import parse_layout

    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the processes that are started
    chosen: Numerics = "exact" if numerics == "exact" else "fast"
    totals = Totals()
    with (
        planned(model, texts, Scoring(parse_layout(layout), dtype, chosen), rolling) as work,
        json_lines(output) as write,
        closing(work.rows(totals, per_token=per_token)) as rows,
    ):
        for row in rows:
            write(row)
    err.print(totals.table())


def _texts(file: str) -> "list[Text]":
    from lockstep.cluster.evaluation.scoring.texts import read_document, read_texts

    with opened_input(file) as content:
        return [read_document(content.read(), Path(file).name)] if file.endswith(".txt") else read_texts(content)


def _rolling(window: int | None, stride: int | None) -> "Rolling | None":
    from lockstep.cluster.evaluation.scoring.score import Rolling

    if window is None and stride is not None:
        raise ValueError("--stride is of rolling windows: give --window, too")
    return None if window is None else Rolling(window, stride or max(1, window // 2))
