"""Shows a run's progress: a live bar on a terminal, a plain line for each step on a pipe."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

FIELDS: Mapping[str, str] = {
    "loss": "loss {:.3f}",
    "held_out_loss": "held-out loss {:.3f}",
    "reward": "reward {:.2f}",
    "accuracy": "accuracy {:.1%}",
    "kl": "kl {:.2g}",
    "rollout_tokens_per_second": "rollout {:,.0f} tok/s",
    "train_tokens_per_second": "train {:,.0f} tok/s",
    "mfu": "{:.0%} of peak",
}
REMEMBERED_STEPS = 20


def duration(seconds: float) -> str:
    """Seconds as people read them: 3.1s, 47s, 3m40s, 2h05m."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


@dataclass
class _Phase:
    """Where one phase stands; times are the clock's, of the last few steps, its start included."""

    name: str
    total: int
    began: float
    step: int = 0
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    seen: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=REMEMBERED_STEPS + 1))

    def advance(self, step: int, now: float, metrics: Mapping[str, float | str]) -> None:
        if not self.seen:
            self.seen.append((step - 1, self.began))
        self.seen.append((step, now))
        self.step, self.metrics = step, metrics

    def step_seconds(self) -> float:
        """Mean over the steps remembered; NaN before the first."""
        if len(self.seen) < 2 or self.seen[-1][0] <= self.seen[0][0]:
            return math.nan
        return (self.seen[-1][1] - self.seen[0][1]) / (self.seen[-1][0] - self.seen[0][0])

    def remaining(self) -> float:
        """Seconds to the phase's end at the present pace."""
        return self.step_seconds() * max(0, self.total - self.step)


class Progress:
    """Shows phases and steps on console: `begin` a phase, `step` through it, `say` what is not a step."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Draw live where console is a terminal, else print lines; clock gives seconds."""
        self._console = console
        self._clock = clock
        self._phase: _Phase | None = None
        self._accuracy: float | None = None
        self._live = Live(console=console, get_renderable=self._view, refresh_per_second=4)
        self._is_live = console.is_terminal

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._live.stop()

    def begin(self, phase: str, total: int) -> None:
        """Start a phase of total steps; the one before leaves its last line above."""
        if self._is_live and self._phase is not None and self._phase.step:
            self.say(_line(self._phase, with_eta=False))
        self._phase = _Phase(phase, total, self._clock())

    def step(self, phase: str, step: int, metrics: Mapping[str, float | str]) -> None:
        """Show step (counted from 1) of phase; a phase never begun has no known end."""
        if self._phase is None or self._phase.name != phase:
            self.begin(phase, 0)
        assert self._phase is not None
        self._phase.advance(step, self._clock(), metrics)
        accuracy = metrics.get("accuracy")
        if isinstance(accuracy, int | float):
            self._accuracy = float(accuracy)
        if not self._is_live:
            self.say(_line(self._phase))

    def say(self, text: str) -> None:
        """Print text as it is, above the live display or as a line of its own."""
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _view(self) -> RenderableType:
        if self._phase is None:
            return Text("")
        shown = _shown(self._phase.metrics)
        if self._accuracy is not None and "accuracy" not in self._phase.metrics:
            shown.append(f"last accuracy {self._accuracy:.1%}")
        return Group(_bar(self._phase), Text("  " + "  ".join(shown), style="dim", overflow="ellipsis", no_wrap=True))


def _bar(phase: _Phase) -> Table:
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=phase.total or None, completed=phase.step, pulse=not phase.total, width=30)
    grid.add_row(Text(phase.name, style="bold"), bar, _count(phase), Text(_eta(phase), style="cyan"))
    return grid


def _count(phase: _Phase) -> str:
    width = len(str(phase.total))
    return f"{phase.step:>{width}}/{phase.total}" if phase.total else str(phase.step)


def _eta(phase: _Phase) -> str:
    return f"eta {duration(phase.remaining())}" if phase.total and phase.seen else ""


def _shown(metrics: Mapping[str, float | str]) -> list[str]:
    values = ((form, metrics.get(key)) for key, form in FIELDS.items())
    return [form.format(value) for form, value in values if isinstance(value, int | float)]


def _line(phase: _Phase, with_eta: bool = True) -> str:
    seconds = phase.metrics.get("step_seconds")
    pace = float(seconds) if isinstance(seconds, int | float) else phase.step_seconds()
    parts = [f"{phase.name:<4} {_count(phase)}", *_shown(phase.metrics), f"{pace:.1f} s"]
    return "  ".join([*parts, _eta(phase)] if with_eta else parts).rstrip()
