r"""Row formats of problems (GSM8K, MATH, DAPO, code), recognised by their fields: a data set needs no script.

Fields of other names are named in the recipe, as in `fields = { question = "query", answer = "gold" }`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lockstep.data.row_reader import BadRow, OnBad, Row, read_rows, stop
from lockstep.data.tasks import code_formats
from lockstep.data.tasks.boxed import last_boxed
from lockstep.data.tasks.problem import Problem

_CALCULATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class RowFormat:
    """A row format: the fields that identify it, and its parser."""

    needs: tuple[str, ...]
    """Fields by which it is recognised."""
    read: Callable[[int, Row], Problem]


def marked(index: int, row: Row) -> Problem:
    """GSM8K: `question` and `answer`, which ends with `#### x` (Cobbe et al. 2021, arXiv:2110.14168).

    The calculator's notes (`<<3*4=12>>`) are left out of the worked solution.
    """
    text = row.text("answer")
    worked, _, answer = text.rpartition("####")
    solution = _CALCULATION.sub("", text).strip() if worked else ""
    return Problem(index, row.text("question"), answer.strip(), solution=solution)


def solved(index: int, row: Row) -> Problem:
    r"""MATH: `problem` with an `answer`, or with a `solution` whose last `\boxed` holds it.

    MATH (Hendrycks et al. 2021, arXiv:2103.03874), AIME and DeepScaleR have it.
    """
    solution = row.text("solution") if row.has("solution") else ""
    answer = row.text("answer").strip() if row.has("answer") else last_boxed(solution)
    if answer is None or not answer:
        name = "solution" if row.has("solution") else "answer"
        raise row.bad(name, r"gives no answer: an 'answer' is needed, or a 'solution' with \boxed{…}")
    return Problem(index, row.text("problem"), answer, solution=solution)


def messages(index: int, row: Row) -> Problem:
    """DAPO: `prompt` as text or messages, and `reward_model.ground_truth` (Yu et al. 2025, arXiv:2503.14476)."""
    question, system = _turns(row)
    truth = row.part("reward_model")
    answer = truth.text("ground_truth")
    if answer.lstrip().startswith("{") and '"inputs"' in answer:
        return Problem(index, question, "", code_formats.input_output(truth, "ground_truth"), system=system)
    return Problem(index, question, answer.strip(), system=system)


def _turns(row: Row) -> tuple[str, str]:
    """The question, and what the system says before it."""
    if isinstance(row.values["prompt"], str):
        return row.text("prompt"), ""
    turns = [Row(row.place, row.checked("prompt", turn, dict)) for turn in row.items("prompt")]
    roles = [turn.text("role") for turn in turns]
    if roles not in (["user"], ["system", "user"]):
        raise row.bad("prompt", f"must be one message of a user, after one of the system or none, and has {roles}")
    return turns[-1].text("content"), turns[0].text("content") if len(turns) == 2 else ""


FORMATS: Mapping[str, RowFormat] = {
    "humaneval": RowFormat(("prompt", "test", "entry_point", "canonical_solution"), code_formats.humaneval),
    "mbpp": RowFormat(("code", "test_list"), code_formats.mbpp),
    "apps": RowFormat(("question", "input_output"), code_formats.apps),
    "livecodebench": RowFormat(("question_content", "public_test_cases"), code_formats.livecodebench),
    "messages": RowFormat(("prompt", "reward_model"), messages),
    "solved": RowFormat(("problem",), solved),
    "marked": RowFormat(("question", "answer"), marked),
}
"""The first format whose fields a row has is taken."""


def read_problems(source: str, fields: Mapping[str, str], *, on_bad: OnBad = stop) -> Iterator[Problem]:
    """Read the problems of a file, a folder or files on the Hub, in order; see `FORMATS`.

    Args:
        on_bad: called with the error of each bad row, which is skipped; the default raises it.

    Raises:
        BadRow: names file, line and field.
    """
    for index, row in enumerate(read_rows(source, on_bad=on_bad)):
        try:
            problem = read_problem(index, row, fields)
        except BadRow as error:
            on_bad(error)
        else:
            yield problem


def read_problem(index: int, row: Row, fields: Mapping[str, str]) -> Problem:
    """Parse a row of any known format into a `Problem`.

    Args:
        fields: for `question`, `answer`, `solution` and others the field of the row that holds it.

    Raises:
        BadRow: names file, line and field.
    """
    row = _renamed(row, fields)
    fitting = [sum(name in row.values for name in shape.needs) / len(shape.needs) for shape in FORMATS.values()]
    best = fitting.index(1.0) if 1.0 in fitting else len(fitting) - 1 - fitting[::-1].index(max(fitting))
    nearest = list(FORMATS.values())[best]
    missing = [name for name in nearest.needs if name not in row.values]
    if missing:
        there = ", ".join(map(repr, row.values)) or "none"
        raise row.bad(
            missing[0],
            f"is missing and no other shape fits; the row has the fields {there}: give {' and '.join(nearest.needs)}, "
            'or name them as in task.fields={question = "query", answer = "gold"}',
        )
    return nearest.read(index, row)


def _renamed(row: Row, fields: Mapping[str, str]) -> Row:
    """The row with the names that shapes know; AIME's files write theirs with a capital."""
    values = {name.lower() if name.lower() in _CAPITALISED else name: value for name, value in row.values.items()}
    for known, name in fields.items():
        if name not in row.values:
            raise BadRow(f"{row.place}: the field {name!r}, which task.fields takes for {known}, is missing")
        values[known] = row.values[name]
    return Row(row.place, values)


_CAPITALISED = ("problem", "question", "answer", "solution")
