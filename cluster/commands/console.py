"""The terminal of the commands: stdout, stderr, progress, and errors as one sentence that names the command's flags.

Text is printed as it is: names of users may look like markup or emoji codes.
"""

import dis
import inspect
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer.models import OptionInfo

import lockstep
from lockstep.cluster.exit_codes import FAILED, INFRASTRUCTURE, INTERRUPTED, REFUSED, Unreachable
from lockstep.cluster.records.progress import duration
from lockstep.data.json_text import encodable

out = Console(soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)

Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error, too.")]


def sentences(command: Callable[..., Any], *, refused: int = REFUSED) -> Callable[..., Any]:
    """Print errors of the user as one sentence, with exit code `refused`; Ctrl-C ends with 130. Adds `--debug`.

    Codes are those of `cluster/exit_codes.py`: a cluster that does not answer is no error of the user.

    The package's errors name arguments, as `max_memory=80 MB`; here they become flags, as `--max-memory 80 MB`.
    A ValueError that nobody raised for the user is a fault of the package: it is printed with its place, and code 1.
    """

    @wraps(command)
    def wrapped(*args: Any, debug: bool = False, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            if debug:
                traceback.print_exception(error)
            fault = None if isinstance(error, OSError) else fault_of(error)
            sentence = with_flags(_plain(error), flags_of(command))
            err.print(Text.assemble(("error: ", "red"), f"{sentence} ({fault})" if fault else sentence))
            unreachable = isinstance(error, Unreachable)
            raise typer.Exit(FAILED if fault else INFRASTRUCTURE if unreachable else refused) from error
        except KeyboardInterrupt as error:
            err.print("interrupted")
            raise typer.Exit(INTERRUPTED) from error

    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    signature = inspect.signature(command)
    signature = signature.replace(parameters=[*signature.parameters.values(), option])
    wrapped.__signature__ = signature  # type: ignore[attr-defined]  # from here typer knows a command's options
    wrapped.__annotations__ = command.__annotations__ | {"debug": Debug}
    return wrapped


def fault_of(error: ValueError) -> str | None:
    """Where an error comes from, if it is no sentence for users: those are raised by name in the package's own code."""
    if any(kind.__module__.startswith("lockstep.") for kind in type(error).__mro__) or error.__traceback__ is None:
        return None
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code, package = last.tb_frame.f_code, Path(lockstep.__file__).parent
    path, rooms = Path(code.co_filename).resolve(), [room.resolve() for room in (package, *package.iterdir())]
    # What a function without a frame raised, such as `int`, was not begun by a `raise`.
    raised = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    if raised and any(room in path.parents for room in rooms):
        return None
    return f"unexpected {type(error).__name__} in {path.name}, line {last.tb_lineno}: --debug prints the traceback"


def flags_of(command: Callable[..., Any]) -> dict[str, str]:
    """The flags of a command's options, by parameter."""
    found: dict[str, str] = {}
    for name, annotation in inspect.get_annotations(command, eval_str=True).items():
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


@contextmanager
def opened_input(name: str) -> Iterator[BinaryIO]:
    """Open a file for reading, or stdin, whose name is `-`."""
    if name == "-":
        yield sys.stdin.buffer
        return
    with Path(name).open("rb") as file:
        yield file


@contextmanager
def json_lines(path: Path | None) -> Iterator[Callable[[Any], None]]:
    """Write JSON lines to a file, or to stdout without one; yields a function that writes a row, at once and whole.

    Where nobody reads them any more, as behind `head`, the command ends without a word, with exit code 1.
    """
    if path is None:
        yield lambda row: _write_line(sys.stdout, row)
        return
    with path.open("w", encoding="utf-8") as file:
        yield lambda row: _write_line(file, row)


def _write_line(file: TextIO, row: Any) -> None:
    line = json.dumps(row, ensure_ascii=False)
    try:
        file.write(f"{line if encodable(line) else json.dumps(row)}\n")
        file.flush()
    except BrokenPipeError as error:
        with open(os.devnull, "wb") as nowhere:  # for what is still buffered, so that closing the file does not fail
            os.dup2(nowhere.fileno(), file.fileno())
        raise typer.Exit(FAILED) from error


LINE_S = 10.0
"""Seconds between two lines of progress where there is no terminal."""


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, else a line now and then; yields a function of what is done and of all there is."""
    if not err.is_terminal:
        yield _Lines(what)
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
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
        err.print(f"{self._what}: {done / total:.0%}, {duration(left)} left")
