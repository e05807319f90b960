"""What the commands share: where they print, and how an error of the user ends as one sentence."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True, highlight=False)


def sentences(command: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of the user are printed as one sentence, with exit code 2; Ctrl-C ends with 130."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            err.print(f"[red]error:[/red] {_plain(error)}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            err.print("interrupted")
            raise typer.Exit(130) from error

    return wrapped


def _plain(error: Exception) -> str:
    return escape(" ".join(str(error).split()))
