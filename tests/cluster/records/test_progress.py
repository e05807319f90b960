import io
import math
import re
import subprocess
import sys
from contextlib import suppress

import pytest
from rich.console import Console

from lockstep.cluster.records.progress import Progress, duration

RL = {
    **{"reward": 0.534, "kl": 0.0041, "rollout_tokens_per_second": 812.3, "train_tokens_per_second": 655.0},
    **{"step_seconds": 3.1, "weight_version": 12},
}


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_pipe_gets_one_plain_line_a_step() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(Console(file=out, width=40), clock) as progress:
        progress.begin("rl", 80)
        for step in range(1, 13):
            clock.now += 3.235
            progress.step("rl", step, RL)
    lines = out.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[-1] == "rl   12/80  reward 0.53  kl 0.0041  rollout 812 tok/s  train 655 tok/s  3.1 s  eta 3m40s"
    assert lines[0].startswith("rl    1/80")


def test_lines_are_flushed_as_they_are_made() -> None:
    script = (
        "import os; from rich.console import Console; from lockstep.cluster.records.progress import Progress\n"
        "with Progress(Console()) as p:\n"
        "    p.begin('sft', 2); p.step('sft', 1, {'loss': 2.5}); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"sft  1/2  loss 2\.500  \d\.\d s  eta \S+\n", done.stdout)


def test_a_resumed_phase_counts_its_own_pace() -> None:
    clock, out = Clock(), io.StringIO()
    progress = Progress(Console(file=out), clock)
    progress.begin("rl", 50)
    for step in (41, 42):
        clock.now += 2
        progress.step("rl", step, {})
    assert out.getvalue().splitlines()[-1] == "rl   42/50  2.0 s  eta 16s"


def test_a_phase_never_begun_and_odd_values() -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out), Clock())
    progress.step("eval", 1, {"stage": "[bold]before", "accuracy": 0.125, "kl": math.nan, "reward": math.inf})
    progress.say("kept :smile: [red]as it is[/red]")
    assert out.getvalue() == "eval 1  reward inf  accuracy 12.5%  kl nan  0.0 s\nkept :smile: [red]as it is[/red]\n"


def test_a_terminal_gets_a_live_view_and_keeps_the_last_line_of_each_phase() -> None:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with Progress(console, clock) as progress:
        progress.begin("sft", 2)
        clock.now += 1
        progress.step("sft", 2, {"loss": 1.25, "accuracy": 0.61})
        progress.begin("rl", 80)
        clock.now += 3
        progress.step("rl", 12, RL)
        progress.say("saved a checkpoint")
    text = out.getvalue()
    assert "sft  2/2  loss 1.250  accuracy 61.0%" in text
    assert "saved a checkpoint" in text
    for phrase in ("12/80", "eta 3m24s", "reward 0.53", "kl 0.0041", "812 tok/s", "last accuracy 61.0%"):
        assert phrase in text
    assert "\x1b[?25h" in text.split("saved a checkpoint")[-1]


def test_an_error_leaves_the_terminal_usable() -> None:
    out = io.StringIO()
    with suppress(KeyboardInterrupt), Progress(Console(file=out, force_terminal=True)) as progress:
        progress.begin("rl", 3)
        raise KeyboardInterrupt
    assert out.getvalue().rstrip("\n").endswith("\x1b[?25h")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.0s"), (3.14, "3.1s"), (9.96, "10s"), (59.6, "1m00s"), (220, "3m40s"), (7500, "2h05m"), (math.nan, "?")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
