"""Chooses the charts of a run's report: metrics over steps, with confidence intervals where something was measured."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lockstep.cluster.evaluation.accuracy import wilson
from lockstep.cluster.records.run_folder import STAGES
from lockstep.cluster.records.svg import Point, Series, line_chart, number, point_chart
from lockstep.cluster.records.tables import Record

UPDATES = ("sft", "preference", "rl")
"""Phases on problems that change the policy; a record is an update."""

MEMORY_UNIT = "GB, peak of the fullest trainer rank"


@dataclass(frozen=True)
class Chart:
    """A titled SVG chart with a sentence below it."""

    title: str
    svg: Markup
    note: str


def run_charts(records: Sequence[Record]) -> list[Chart]:
    """The charts of a run, for the phases that it has."""
    rl, sft = of_phase(records, "rl"), of_phase(records, "sft")
    if text := of_phase(records, "pretrain"):
        return _pretrain_charts(text, of_phase(records, "held_out"))
    charts = [
        _accuracy_chart(records),
        *_task_charts(of_phase(records, "eval")),
        _chart("Reward", rl, {"reward": "reward"}, "mean reward", "Mean over the completions of each step."),
        _chart("KL to the reference", rl, {"kl": "KL"}, "nats per token", "How far the policy moved from its start."),
        _chart("Entropy", rl, {"entropy": "entropy"}, "nats per token", "Falls as the policy grows sure of its words."),
        _speed_chart(rl),
        _mismatch_chart(rl),
        _chart("Completion length", rl, {"completion_tokens": "length"}, "tokens", "", True),
    ]
    if _measured(rl, "memory_gb"):
        charts.append(_chart("Memory", rl, {"memory_gb": "memory"}, MEMORY_UNIT, "", True))
    if compared := of_phase(records, "preference") or of_phase(records, "reward"):
        names = {"accuracy": "in training", "held_out_accuracy": "held out"}
        note = "Share of pairs that the model has in the right order."
        charts.append(_chart("Preferences", compared, names, "share of pairs", note, x_label="step"))
    if sft:
        measured = _measured(sft, "held_out_loss")
        names = {"loss": "in training", "held_out_loss": "held out"} if measured else {"loss": "loss"}
        charts.append(_chart("Supervised loss", sft, names, "nats per token", "", x_label="supervised step"))
    return charts


def _pretrain_charts(text: Sequence[Record], held_out: Sequence[Record]) -> list[Chart]:
    of = {
        "Loss": (text, "loss", "nats per token"),
        "Held-out loss": (held_out, "loss", "nats per token"),
        "Gradient norm": (text, "grad_norm", "before clipping"),
        "Learning rate": (text, "learning_rate", ""),
        "Speed": (text, "train_tokens_per_second", "tokens per second"),
        "Memory": (text, "memory_gb", MEMORY_UNIT),
    }
    return [
        _chart(title, records, {key: title.lower()}, unit, "", title in ("Speed", "Memory"), "step")
        for title, (records, key, unit) in of.items()
        if _measured(records, key)
    ]


def _measured(records: Sequence[Record], key: str) -> bool:
    """Whether any record has a number there."""
    return any(map(math.isfinite, column(records, key)))


def _chart(
    title: str,
    records: Sequence[Record],
    names: Mapping[str, str],
    unit: str,
    note: str,
    zero: bool = False,
    x_label: str = "RL step",
) -> Chart:
    """Columns of the records over their steps, each with its moving average."""
    steps = column(records, "step")
    series = [Series(name, steps, column(records, key)) for key, name in names.items()]
    window = max(3, len(records) // 10) if len(records) > 5 else 1
    if window > 1 and len(series) > 1:
        note = f"{note} Faint: each step; firm: mean of the last {window}.".strip()
    return Chart(title, Markup(line_chart(title, series, x_label, unit, window, zero)), note)


def _speed_chart(rl: Sequence[Record]) -> Chart:
    names = {"rollout_tokens_per_second": "rollout", "train_tokens_per_second": "training"}
    return _chart("Speed", rl, names, "tokens per second", "", zero=True)


def _mismatch_chart(rl: Sequence[Record]) -> Chart:
    """Rollout against trainer; the largest difference would dwarf the mean, so it stands in the note."""
    largest = [value for value in column(rl, "mismatch_max") if math.isfinite(value)]
    note = "Rollout engine against trainer, on the same tokens and weights."
    if largest and max(largest) == 0:
        note = f"{note} Zero at every token of the run: the two agree bit for bit."
    elif largest:
        note = f"{note} Largest at any token of the run: {number(max(largest))}."
    names = {"mismatch_mean": "mismatch"}
    return _chart("Rollout–trainer mismatch", rl, names, "log-prob difference, nats", note, zero=True)


def _accuracy_chart(records: Sequence[Record]) -> Chart:
    """Held-out accuracy over all updates made so far, whichever stage made them."""
    points: list[Point] = []
    updates, supervised = 0, sum(record.get("phase") in UPDATES and record.get("phase") != "rl" for record in records)
    for record in records:
        updates += record.get("phase") in UPDATES
        if record.get("phase") == "eval":
            graded = count_of(record, "total") - count_of(record, "ungradable")
            low, high = wilson(count_of(record, "correct"), graded)
            stage = str(record.get("stage", ""))
            label = stage if stage in STAGES else ""
            points.append(Point(updates, 100 * value_of(record, "accuracy"), 100 * low, 100 * high, label))
    marks = [Point(supervised, 0, 0, 0, "RL begins")] if supervised and of_phase(records, "rl") else []
    title, x_label = "Held-out accuracy", "updates of all phases" if supervised else "RL step"
    svg = point_chart(title, points, x_label, "percent correct", marks)
    return Chart(title, Markup(svg), "Bars are 95% Wilson intervals.")


def _task_charts(evaluations: Sequence[Record]) -> list[Chart]:
    """Held-out accuracy of each task over all steps, where there are several."""
    unit, step = "share correct", "step of all phases"
    return [
        _chart(f"Held-out accuracy: {task}", evaluations, {f"accuracy/{task}": task}, unit, "", True, step)
        for task in task_names(evaluations)
    ]


def task_names(evaluations: Iterable[Mapping[str, object]]) -> list[str]:
    """Names of the tasks whose accuracy evaluations have."""
    keys = dict.fromkeys(key for each in evaluations for key in each if key.startswith("accuracy/"))
    return [key.removeprefix("accuracy/") for key in keys]


def of_phase(records: Iterable[Record], phase: str) -> list[Record]:
    """The records of a phase."""
    return [record for record in records if record.get("phase") == phase]


def column(records: Iterable[Record], key: str) -> list[float]:
    """A field of each record, NaN where it is missing."""
    return [value_of(record, key) for record in records]


def value_of(record: Mapping[str, object], key: str, default: float = math.nan) -> float:
    """A field as a number."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else default


def count_of(record: Mapping[str, object], key: str) -> int:
    """A field as a whole number, 0 where it is none."""
    value = value_of(record, key, 0.0)
    return int(value) if math.isfinite(value) else 0
