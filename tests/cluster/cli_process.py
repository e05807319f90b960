"""The `lockstep` command as a child process, and a recipe that runs in seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil
from typer.testing import CliRunner, Result

from lockstep.cluster.cli import app
from tests.documented import check_keys

RECIPE = """
name = "tiny"
run = "{folder}/{{name}}"

[model]
source = "{model}"
dtype = "float32"

[task]
generator = "{problems}"
train = 32
held_out = 4

[layout]
data = 2

[rollout]
workers = 1
sequences = 8
length = 128

[evaluation]
max_new_tokens = 4

[supervised]
steps = 16
problems_per_step = 8
optimizer = {{ learning_rate = 3e-3 }}

[rl]
steps = 2
prompts_per_step = 4
group_size = 4
sampling = {{ max_new_tokens = 8 }}
"""


def write_recipe(folder: Path, model: Path) -> Path:
    """A recipe of supervised and RL steps, whose run goes to folder/<name>.

    Answers are one of two digits. A few supervised steps teach a random model to write one of them, so that some of its
    answers are right and RL has something to learn from.
    """
    path, problems = folder / "tiny.toml", folder / "problems.jsonl"
    rows = [{"question": f"What is {a} + {b}?", "answer": str(3 + (a + b) % 2)} for a in range(10) for b in range(a)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(RECIPE.format(folder=folder, model=model, problems=problems))
    return path


def overrides(*pairs: str) -> list[str]:
    """`--set` options."""
    return [part for pair in pairs for part in ("--set", pair)]


def lockstep(*arguments: str) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    """The one sentence that a command ends with."""
    result = lockstep(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


class Train(Protocol):
    """Runs a recipe to its end; returns the exit code and what it printed into `log`."""

    def __call__(self, log: Path, recipe: Path, *settings: str, options: tuple[str, ...] = ()) -> tuple[int, str]: ...


class Command:
    """`lockstep` in a session of its own, as a terminal would start it; everything that it prints goes to one file."""

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        self.log = log
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "lockstep", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | environment,
            )
        self.process = psutil.Process(self._child.pid)

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(errors="replace")

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._child.poll() is None

    def wait_for(self, text: str, timeout: float = 240.0) -> None:
        """Until it has printed text."""
        until(lambda: text in self.output or not self.runs, timeout)
        assert text in self.output, self.output

    def wait_for_file(self, path: Path, timeout: float = 240.0) -> None:
        """Until there is something in a file."""
        until(lambda: (path.is_file() and path.stat().st_size > 0) or not self.runs, timeout)
        assert path.is_file(), self.output

    def wait(self, timeout: float = 240.0) -> int:
        """Until it ends; its exit code."""
        return self._child.wait(timeout)

    def descendants(self, title: str = "") -> list[psutil.Process]:
        """All processes below it whose title starts so."""
        found = []
        for process in self.process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to all processes of its group."""
        os.killpg(self._child.pid, signal.SIGINT)

    def kill(self) -> None:
        """End it and all below it, whatever they do."""
        with suppress(psutil.NoSuchProcess):
            for process in [*self.process.children(recursive=True), self.process]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._child.wait()


def until(condition: Callable[[], bool], timeout: float) -> None:
    """Wait for a condition, or fail."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s"
        time.sleep(0.1)


def summary(run: Path) -> dict[str, object]:
    """A run's summary.json."""
    found: dict[str, object] = json.loads((run / "summary.json").read_text())
    check_keys("summary.json", set(found))
    return found


def metrics(run: Path, phase: str) -> list[dict[str, float]]:
    """The lines of one phase."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        check_keys(line["phase"], set(line))
    return [line for line in lines if line["phase"] == phase]
