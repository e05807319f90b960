"""Filters training problems by their measured pass rate, that of `lockstep eval --train` or one that the data has.

Problems are found by a digest of their content, so that a measurement holds in whatever order they come. All have to be
measured: a problem of unknown difficulty is no problem of medium difficulty.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lockstep.data.row_reader import BadRow, Row, read_rows
from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.problem_formats import read_problem
from lockstep.data.tasks.task import BadProblems, Split, TaskConfig

COUNTS = "problems.jsonl"
"""The file in which `lockstep eval` leaves the counts of verdicts on each problem."""


def filter_by_pass_rate(split: Split, task: TaskConfig) -> Split:
    """The split with the measured pass rates of its training problems, without those outside of `task.pass_rate`.

    Solved examples and held-out problems stay as they are, so that prompts are those that were measured.

    Raises:
        BadRow: names file, line and field of a row of `task.pass_rates` that cannot be used.
        BadProblems: when a problem was not measured, or none is left.
    """
    low, high = task.pass_rate
    measured = _measured(split.train, read_pass_rates(task.pass_rates, task.fields), task)
    kept = [problem for problem, rate in measured if low <= rate <= high]
    if not kept:
        raise BadProblems(
            f"task.pass_rate=[{low}, {high}] leaves none of {len(measured)} training problems, whose pass rates are "
            f"{_range([rate for _, rate in measured])}: widen it"
        )
    said = (
        f"Of {len(measured)} training problems {len(measured) - len(kept)} were left out, whose measured pass rates "
        f"are not within {low} to {high}."
    )
    train = tuple(replace(problem, index=index) for index, problem in enumerate(kept))
    return replace(split, train=train, filtered=said)


def read_pass_rates(source: str, fields: Mapping[str, str]) -> dict[str, float]:
    """The pass rates of problems, from 0 to 1, by `Problem.digest`; NaN where no completion could be graded.

    Args:
        source: the folder that `lockstep eval --train` left; or files with a row for each problem, which has a field
            `pass_rate` beside those of `problem_formats`.
        fields: see `read_problem`; `pass_rate` may be among them.

    Raises:
        BadRow: names file, line and field.
        BadProblems: when an evaluation has not ended, or drew no samples.
    """
    correct, graded = defaultdict[str, float](float), defaultdict[str, float](float)
    for row in read_rows(counts_file(source)):
        digest, right, of = _counted(row) if row.has("digest") else _given(row, fields)
        correct[digest] += right
        graded[digest] += of
    return {digest: correct[digest] / of if of else math.nan for digest, of in graded.items()}


def counts_file(source: str) -> str:
    """The file with the counts of an evaluation's folder; any other source as it is.

    Raises:
        BadProblems: when the evaluation has not ended.
    """
    folder = Path(source)
    if not (folder / "settings.json").is_file():
        return source
    if not (folder / COUNTS).is_file():
        raise BadProblems(f"the evaluation in {source} has not ended, and has no {COUNTS}: give its command again")
    return str(folder / COUNTS)


def _counted(row: Row) -> tuple[str, float, float]:
    """Digest, correct and graded samples of a problem that `lockstep eval` counted."""
    if not row.has("sampled"):
        raise BadProblems(f"{row.place} has greedy answers alone: measure pass rates with lockstep eval --samples 8")
    counts = row.part("sampled")
    correct, incorrect = (_number(counts, name) for name in ("correct", "incorrect"))
    return row.text("digest"), correct, correct + incorrect


def _given(row: Row, fields: Mapping[str, str]) -> tuple[str, float, float]:
    """Digest and pass rate of a problem, as one graded sample."""
    problem, rate = read_problem(0, row, fields), _number(row, fields.get("pass_rate", "pass_rate"))
    if rate > 1:
        raise row.bad(fields.get("pass_rate", "pass_rate"), f"must be a share from 0 to 1, and is {rate}")
    return problem.digest, rate, 1.0


def _number(row: Row, name: str) -> float:
    try:
        number = float(row.text(name))
    except ValueError as error:
        raise error if isinstance(error, BadRow) else row.bad(name, "must be a number") from error
    if not 0 <= number < math.inf:
        raise row.bad(name, f"must be a number from 0 on, and is {number}")
    return number


def _measured(problems: Sequence[Problem], rates: Mapping[str, float], task: TaskConfig) -> list[tuple[Problem, float]]:
    """The problems with their pass rates, which they have from there on."""
    unknown = [problem for problem in problems if problem.digest not in rates]
    if unknown:
        raise BadProblems(
            f"{len(unknown)} of {len(problems)} training problems have no pass rate in task.pass_rates="
            f"{task.pass_rates}, the first of them {unknown[0].question[:80]!r}: measure them, too, by lockstep eval "
            "--train, or lower task.train"
        )
    found = [(problem, rates[problem.digest]) for problem in problems]
    return [(replace(problem, pass_rate=rate), rate) for problem, rate in found]


def _range(rates: Sequence[float]) -> str:
    known = [rate for rate in rates if not math.isnan(rate)]
    return f"{min(known):.3g} to {max(known):.3g}" if known else "unknown, since no completion could be graded"
