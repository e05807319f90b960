"""Runs a study over checkpoints, places and seeds, and makes its table: what is measured already is not repeated."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import xxhash

from lockstep.cluster.evaluation.studies.intervals import Interval, exponent, mean_interval
from lockstep.cluster.evaluation.studies.measurements import Cell, Measurement, MeasurementFile
from lockstep.cluster.evaluation.studies.study import Study, StudySettings, Subject, Workload
from lockstep.model.formats.registry import open_model
from lockstep.rl.rollout.config import EngineConfig
from lockstep.rl.rollout.loading import open_engine
from lockstep.rl.verifiers.judge import Judge

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Work:
    """A study with everything that it is run on."""

    name: str
    study: Study
    settings: StudySettings
    checkpoints: tuple[str, ...]
    dtype: str = "bfloat16"
    cache_gib: float = 1.0
    workload: Workload | None = None

    def digest(self) -> str:
        """Of all that a measurement depends on, beside the weights, its place and its seed."""
        said = {
            "settings": self.settings.model_dump(mode="json", exclude={"seeds", self.study.axis}),
            "dtype": self.dtype,
            "workload": self.workload and [self.workload.task.model_dump(mode="json"), self.workload.seed],
        }
        return xxhash.xxh3_64_hexdigest(json.dumps(said, sort_keys=True).encode())


def run_study(work: Work, folder: Path, progress: Progress) -> list[Measurement]:
    """Measure what the folder lacks; returns all measurements of the work, in order of checkpoints, places and seeds.

    Args:
        progress: told how many cells are measured, and how many there are.

    Raises:
        ValueError: one sentence on a checkpoint that cannot be opened, or given twice, before anything is measured.
    """
    if len(set(work.checkpoints)) < len(work.checkpoints):
        raise ValueError("a checkpoint is given twice: its rows could not be told apart")
    for name in work.checkpoints:
        work.study.check(open_model(name).config, work.settings)
    file, found = MeasurementFile(folder), list[Measurement]()
    cells = len(work.study.places(work.settings)) * work.settings.seeds
    with Judge(work.workload.verifier, note=lambda _: None) if work.workload else nullcontext() as judge:
        for name in work.checkpoints:
            for measurement in _of_checkpoint(work, name, file, judge):
                found.append(measurement)
                progress(len(found), cells * len(work.checkpoints))
    return found


def _of_checkpoint(work: Work, name: str, file: MeasurementFile, judge: Judge | None) -> Iterator[Measurement]:
    settings, digest = work.settings, work.digest()
    with open_engine(name, work.dtype, EngineConfig(cache_gib=work.cache_gib)) as (engine, tokenizer):
        subject, weights = Subject(engine, tokenizer, work.workload, judge), engine.weights_digest()
        for place in work.study.places(settings):
            for seed in range(settings.seeds):
                cell = Cell(work.name, name, weights, digest, place, seed)
                measured = file.get(cell)
                if measured is None:
                    engine.forget()  # what earlier cells computed, which would change the rounding of this one
                    measured = Measurement(cell, work.study.measure(subject, settings, place, seed))
                    file.add(measured)
                yield measured


@dataclass(frozen=True)
class Row:
    """A line of a study's table: a measure of a checkpoint at a place, with its interval over seeds."""

    checkpoint: str
    place: float | None
    """None for an exponent, which is of all places."""
    measure: str
    interval: Interval


def table_rows(study: Study, measurements: Sequence[Measurement]) -> list[Row]:
    """The lines of a table, by checkpoint and measure, with the exponents that the study fits behind each measure."""
    found = []
    for checkpoint in dict.fromkeys(m.cell.checkpoint for m in measurements):
        own = [m for m in measurements if m.cell.checkpoint == checkpoint]
        for measure in study.units:
            for place in dict.fromkeys(m.cell.place for m in own):
                values = [m.numbers()[measure] for m in own if m.cell.place == place and measure in m.numbers()]
                if values:
                    found.append(Row(checkpoint, place, measure, mean_interval(values)))
            if measure in study.slopes:
                found.append(Row(checkpoint, None, f"exponent of {measure}", mean_interval(_exponents(own, measure))))
    return found


def _exponents(own: Sequence[Measurement], measure: str) -> list[float]:
    """The exponent of a measure over the places, for each seed."""
    seeds = dict.fromkeys(m.cell.seed for m in own)
    return [
        exponent([m.cell.place for m in some], [m.numbers()[measure] for m in some])
        for some in ([m for m in own if m.cell.seed == seed] for seed in seeds)
    ]


def markdown(study: Study, rows: Sequence[Row]) -> str:
    """The table as Markdown: the mean and its 95% interval over seeds."""
    lines = [
        f"| checkpoint | measure | {study.axis} | mean | 95% interval | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        unit = study.units.get(row.measure, "")
        place = "all" if row.place is None else f"{row.place:g}"
        measure = f"{row.measure}, {unit}" if unit else row.measure
        interval = row.interval
        ends = f"{interval.low:.4g} to {interval.high:.4g}"
        lines.append(f"| {row.checkpoint} | {measure} | {place} | {interval.mean:.4g} | {ends} | {interval.count} |")
    return "\n".join(lines) + "\n"
