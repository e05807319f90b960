"""The terminal of the commands: stdout, stderr, progress, and errors as one sentence that names the command's flags."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import get_annotations
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from typer.models import OptionInfo

from lockstep.cluster.records.progress import duration

out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True, highlight=False)


def sentences(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print errors of the user as one sentence, with exit code 2; Ctrl-C ends with 130.

    The package's errors name arguments, as `max_memory=80 MB`; here they become flags, as `--max-memory 80 MB`.
    """

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            err.print(f"[red]error:[/red] {escape(with_flags(_plain(error), flags_of(command)))}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            err.print("interrupted")
            raise typer.Exit(130) from error

    return wrapped


def flags_of(command: Callable[..., Any]) -> dict[str, str]:
    """The flags of a command's options, by parameter."""
    found: dict[str, str] = {}
    for name, annotation in get_annotations(command, eval_str=True).items():
        for option in getattr(annotation, "__metadata__", ()):
            if isinstance(option, OptionInfo):
                declared = (option.default, *(option.param_decls or ()))  # typer keeps the first one as a default
                given = [flag for flag in declared if isinstance(flag, str) and flag.startswith("--")]
                found[name] = given[0] if given else f"--{name.replace('_', '-')}"
    return found


def with_flags(sentence: str, flags: dict[str, str]) -> str:
    """A sentence that names flags where it named parameters: `name=` at the beginning of a word."""
    if not flags:
        return sentence
    pattern = rf"(?<![\w.'\"])({'|'.join(map(re.escape, flags))})=(?=\S)"
    return re.sub(pattern, lambda found: f"{flags[found[1]]} ", sentence)


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())


LINE_S = 10.0
"""Seconds between two lines of progress where there is no terminal."""


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, else a line now and then; yields a function of what is done and of all there is."""
    if not err.is_terminal:
        yield _Lines(what)
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Progress as lines with the estimated time left, at the mean pace since the first call."""

    def __init__(self, what: str) -> None:
        self._what, self._first = what, (time.monotonic(), 0)
        self._said: float | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._said is None:
            self._said, self._first = now, (now, done)
        if now - self._said < LINE_S:
            return
        self._said = now
        began, before = self._first
        left = (now - began) * (total - done) / max(1, done - before)
        err.print(f"{self._what}: {done / total:.0%}, {duration(left)} left", markup=False)
