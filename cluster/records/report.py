"""Writes report.html, one self-contained page: accuracy by stage with intervals, charts, sample answers, settings.

The page is read from the run folder alone, so it can be made during a run, after one, or after a crash; what is missing
is said. It needs no network and no library: style, charts and script are inside. Python does the arithmetic and the
template `report.html.j2` lays it out.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.table import Table

from lockstep.cluster.atomic_files import replace_file
from lockstep.cluster.records.charts import UPDATES, column, count_of, of_phase, run_charts, value_of
from lockstep.cluster.records.ending import note_killed
from lockstep.cluster.records.progress import duration
from lockstep.cluster.records.run_folder import METRICS, RECIPE, STAGES, RunFolder
from lockstep.cluster.records.stages import Stage, held_out_stages
from lockstep.cluster.records.svg import number
from lockstep.cluster.records.tables import Record

CHANGES = ("fixed", "still wrong", "broken", "still correct")
PAIRS_SHOWN = 24
LONGEST_TEXT = 4000
STATUS_WORDS = {
    "finished": "finished",
    "interrupted": "interrupted: the numbers below stop where the run did",
    "failed": "failed: the numbers below stop where the run did",
    "killed": "killed: the numbers below stop where the run did",
    "running": "still running, or on a host that is not this one and killed",
}


@dataclass(frozen=True)
class Answer:
    """The policy's completion of one problem, and its verdict."""

    completion: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class Pair:
    """The first and the last answer to one held-out problem."""

    problem: int
    prompt: str
    answer: str
    before: Answer
    after: Answer

    @property
    def change(self) -> str:
        """How the verdict changed: one of CHANGES."""
        was, now = self.before.outcome == "correct", self.after.outcome == "correct"
        if was:
            return "still correct" if now else "broken"
        return "fixed" if now else "still wrong"


def write_report(run: Path) -> Path:
    """Write report.html into the run folder and return its path; a run that was killed is written down as that.

    Raises:
        RunError: run is not a run's folder, or its metrics are damaged before the last line.
    """
    note_killed(run)
    folder = RunFolder.open(run)
    source = files("lockstep.cluster.records").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "gained": _gained, "clip": _clip, "words": _words}
    page = environment.from_string(source).render(_page(folder))
    replace_file(folder.path / "report.html", page.encode())
    return folder.path / "report.html"


def summary_table(run: Path) -> Table:
    """A summary of the run for a terminal: accuracy by stage, then steps, wall time and speed.

    Raises:
        RunError: run is not a run's folder, or its metrics are damaged before the last line.
    """
    folder = RunFolder.open(run)
    records = folder.metrics()
    table = Table(title=str(folder.summary()["name"]), caption=_facts_lines(folder, records), caption_justify="left")
    if of_phase(records, "pretrain"):
        return _loss_rows(table, of_phase(records, "held_out"))
    table.add_column("held-out")
    for heading in ("accuracy", "95% interval", "correct", "ungradable", "gain"):
        table.add_column(heading, justify="right")
    for stage in held_out_stages(folder, records):
        low, high = stage.interval
        interval, gain = f"{low:.1%} – {high:.1%}", "" if stage.gain is None else f"{_gained(stage.gain)} points"
        correct = f"{stage.correct}/{stage.total}"
        table.add_row(stage.name, _percent(stage.accuracy), interval, correct, str(stage.ungradable), gain)
        for task, share in stage.tasks.items():
            table.add_row(f"  {task}", _percent(share))
    return table


def _loss_rows(table: Table, records: Sequence[Record]) -> Table:
    for heading in ("step", "held-out loss", "perplexity"):
        table.add_column(heading, justify="right")
    for record in records:
        loss, perplexity = (number(value_of(record, key)) for key in ("loss", "perplexity"))
        table.add_row(str(count_of(record, "step")), loss, perplexity)
    return table


def _page(folder: RunFolder) -> dict[str, object]:
    summary, records, evaluations = folder.summary(), folder.metrics(), folder.evaluations()
    stages, recipe = held_out_stages(folder, records), folder.recipe()
    first, last = _first_and_last(list(evaluations))
    pairs = _pairs(evaluations.get(first, []), evaluations.get(last, [])) if first != last else []
    return {
        "name": summary["name"],
        "status": summary["status"],
        "status_words": STATUS_WORDS.get(str(summary["status"]), summary["status"]),
        "error": summary.get("error"),
        "ended": summary.get("ended"),
        "started": _moment(summary.get("started")),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "stages": stages,
        "gain": stages[-1].accuracy - stages[0].accuracy if len(stages) > 1 else None,
        "facts": _facts(folder, records),
        "split": _mapping(summary.get("split")),
        "charts": run_charts(records),
        "pairs": _choose(pairs),
        "counts": {change: sum(pair.change == change for pair in pairs) for change in CHANGES},
        "compared": (first, last),
        "missing": _missing(records, stages, list(evaluations), recipe),
        "recipe": recipe,
        "setup": {name: _mapping(summary.get(name)) for name in ("software", "machine")},
    }


def _facts(folder: RunFolder, records: Sequence[Record]) -> dict[str, str]:
    """Steps, wall time and speed, as heading and words."""
    summary = folder.summary()
    seconds = max([value_of(summary, "seconds", 0.0), *(value_of(record, "time", 0.0) for record in records)])
    if steps := of_phase(records, "pretrain"):
        speed, share = (_middle(column(steps, key)) for key in ("train_tokens_per_second", "mfu"))
        return {
            "steps": str(len(steps)),
            "wall time": duration(seconds),
            "train speed": f"{number(speed)} tokens/s",
            "share of the measured peak": _percent(share),
        }
    facts = {"RL steps": str(len(of_phase(records, "rl"))), "wall time": duration(seconds)}
    if supervised := of_phase(records, "sft"):
        facts = {"supervised steps": str(len(supervised))} | facts
    for name in ("rollout", "train"):
        speed = _speed(summary, records, f"{name}_tokens_per_second")
        facts[f"{name} speed"] = f"{number(speed)} tokens/s" if math.isfinite(speed) else "not measured"
    return facts


def _middle(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _facts_lines(folder: RunFolder, records: Sequence[Record]) -> str:
    """Two lines: steps and time, then speeds."""
    facts = [f"{name} {value}" for name, value in _facts(folder, records).items()]
    return " · ".join(facts[:-2]) + "\n" + " · ".join(facts[-2:])


def _speed(summary: Record, records: Sequence[Record], key: str) -> float:
    """The summary's figure, or the mean over RL steps where the run has not written one."""
    recorded = value_of(_mapping(summary.get("speed")), key)
    if math.isfinite(recorded):
        return recorded
    speeds = [value for value in column(of_phase(records, "rl"), key) if math.isfinite(value)]
    return sum(speeds) / len(speeds) if speeds else math.nan


def _pairs(before: Iterable[Record], after: Iterable[Record]) -> list[Pair]:
    firsts = {row["problem"]: row for row in before}
    lasts = {row["problem"]: row for row in after}
    return [
        Pair(
            problem=problem,
            prompt=str(firsts[problem].get("prompt") or ""),
            answer=str(firsts[problem].get("answer") or ""),
            before=_answer(firsts[problem]),
            after=_answer(lasts[problem]),
        )
        for problem in sorted(firsts.keys() & lasts.keys())
    ]


def _answer(row: Record) -> Answer:
    return Answer(*(str(row.get(key) or "") for key in ("completion", "outcome", "reason")))


def _choose(pairs: Sequence[Pair], most: int = PAIRS_SHOWN) -> list[Pair]:
    """Fixed, then still wrong, then broken: half of the places to the first, a quarter to each other, spares shared."""
    kinds = [[pair for pair in pairs if pair.change == change] for change in CHANGES[:3]]
    shares = [min(len(kind), share) for kind, share in zip(kinds, (most // 2, most // 4, most // 4), strict=True)]
    for index, kind in enumerate(kinds):
        shares[index] += min(len(kind) - shares[index], most - sum(shares))
    return [pair for kind, share in zip(kinds, shares, strict=True) for pair in kind[:share]]


def _first_and_last(names: Sequence[str]) -> tuple[str, str]:
    known = [name for name in STAGES if name in names]
    return (known[0], known[-1]) if known else ("before", "before")


def _missing(
    records: Sequence[Record], stages: Sequence[Stage], evaluations: Sequence[str], recipe: str | None
) -> list[str]:
    """Sentences about what a whole run would have left and this one has not, or not yet."""
    if of_phase(records, "pretrain"):
        return [] if recipe is not None else [f"There is no {RECIPE}."]
    measured = {stage.name for stage in stages}
    phases = {"supervised": "sft", "preferred": "preference", "after": "rl"}
    expected = [name for name in STAGES if name == "before" or of_phase(records, phases[name])]
    sentences = [f"There is no held-out measurement “{name}”." for name in expected if name not in measured]
    sentences += [f"No completions were kept for “{name}”." for name in STAGES if name in measured - set(evaluations)]
    stepped = any(of_phase(records, name) for name in (*UPDATES, "reward"))
    sentences += [] if stepped else [f"There is no step in {METRICS}."]
    return sentences + ([] if recipe is not None else [f"There is no {RECIPE}."])


def _mapping(value: object) -> dict[str, object]:
    """A table of the summary; empty where the run wrote none."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def _words(value: object) -> str:
    """A value of the summary as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return "none" if value is None else str(value)


def _moment(started: object) -> str:
    try:
        return datetime.fromisoformat(str(started)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return "at an unknown time"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _gained(gain: float) -> str:
    """A difference of two shares in points, signed."""
    return f"{100 * gain:+.1f}".replace("-", "−")


def _clip(text: str) -> str:
    rest = len(text) - LONGEST_TEXT
    return text if rest <= 0 else f"{text[:LONGEST_TEXT]} … ({rest:,} more characters)"
