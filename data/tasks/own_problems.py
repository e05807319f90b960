"""Problems that a function of the user's makes, or that one filters; see `user_function` for how they are named."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lockstep.data.row_reader import BadRow, OnBad, Row, stop
from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.problem_formats import read_problem
from lockstep.data.tasks.user_function import BadFunction, accepting, load

FILTERED_BY = ("question", "answer", "solution", "system")
"""Arguments that a filter may ask for by name: fields of `Problem`."""


def own_problems(
    name: str, settings: Mapping[str, Any], seed: int, fields: Mapping[str, str], *, on_bad: OnBad = stop
) -> Iterator[Problem]:
    """Problems from the rows that a function returns, as dictionaries like those of files; see `problem_formats`.

    Args:
        settings: arguments of the function.
        seed: another argument, for a function that takes one.
        fields: see `read_problem`.
        on_bad: called with the error of each bad row, which is skipped; the default raises it.

    Raises:
        BadRow: names the function, the row and the field.
        BadFunction: when the function cannot be loaded, or raises.
    """
    for index, values in enumerate(_rows(name, settings, seed)):
        place = f"{name}, row {index + 1}"
        try:
            if not isinstance(values, Mapping):
                raise BadRow(f"{place}: a dictionary is needed, and this is {type(values).__name__}")
            yield read_problem(index, Row(place, values), fields)
        except BadRow as error:
            on_bad(error)


def filtered(problems: Iterable[Problem], name: str) -> Iterator[Problem]:
    """The problems for which a function of the user's returns true.

    Raises:
        BadFunction: when the function cannot be loaded, or raises.
    """
    keeps = accepting(load(name), FILTERED_BY, name)
    for problem in problems:
        try:
            kept = keeps(fields_of(problem))
        except Exception as error:
            question = problem.question[:80]
            raise BadFunction(f"{name} failed on {question!r} ({type(error).__name__}: {error})") from error
        if kept:
            yield problem


def fields_of(problem: Problem) -> dict[str, str]:
    """What functions of the user's may ask of a problem, by `FILTERED_BY`."""
    return {field: getattr(problem, field) for field in FILTERED_BY}


def _rows(name: str, settings: Mapping[str, Any], seed: int) -> Iterator[Any]:
    function = load(name)
    takes_seed = "seed" not in settings and "seed" in inspect.signature(function).parameters
    try:
        yield from function(**settings, **({"seed": seed} if takes_seed else {}))
    except Exception as error:
        raise BadFunction(f"{name} failed with {dict(settings)} ({type(error).__name__}: {error})") from error
