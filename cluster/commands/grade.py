"""The command `lockstep grade`: a verdict for each row of a file of answers."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from lockstep.cluster.commands.console import err, sentences

if TYPE_CHECKING:
    from lockstep.cluster.evaluation.grading import Task


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

    chosen = _task(task, audit=audit)
    processes = workers or os.cpu_count() or 1
    outcomes, bad, audited = Counter[str](), 0, list[Graded]()
    with ExitStack() as stack:
        lines = stack.enter_context(_opened(answers))
        pool = stack.enter_context(pool_for(chosen, processes, deadline, _say))
        finish = stack.enter_context(auditor(processes, deadline)) if audit else Graded
        rows = read_rows(lines, "stdin" if answers == "-" else answers, chosen)
        for graded in grade_rows(rows, pool, processes, finish):
            print(graded.as_json(audit=audit), flush=True)
            outcomes[graded.verdict.outcome] += 1
            if graded.row.problem:
                bad += 1
                _say(graded.row.problem)
            if audit:
                audited.append(graded)
    for line in (summary(outcomes, bad), *(audit_summary(audited) if audit else ())):
        _say(line)
    if bad:
        raise typer.Exit(1)


def _task(name: str, *, audit: bool) -> "Task":
    if audit and name != "math":
        raise ValueError(f"--audit compares rules that find a final answer, which --task {name} has none of: use math")
    match name:
        case "math" | "code" | "gym":
            return name
        case _:
            raise ValueError(f"--task {name!r} is not supported: use math, code or gym")


@contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdin.buffer
        return
    with Path(name).open("rb") as file:
        yield file


def _say(line: str) -> None:
    err.print(line)
