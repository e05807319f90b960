"""The folder of a run: metrics, tables and summary in open formats, readable while it runs and after a crash.

Lines are appended and flushed, whole files are written beside their place and renamed into it. So a reader sees each
file complete or not at all, and a killed run loses at most the line that it was writing.
"""

import json
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from lockstep.cluster.atomic_files import cut_half_line, replace_file
from lockstep.cluster.records.scalars import ScalarWriter
from lockstep.cluster.records.tables import (
    EVALUATION_COLUMNS,
    ROLLOUT_COLUMNS,
    Record,
    Row,
    parquet_files,
    read_rows,
    write_arrow,
    write_table,
)

RECIPE, SUMMARY, METRICS = "recipe.toml", "summary.json", "metrics.jsonl"
COMPARISONS, CONVERSATIONS = "comparisons.parquet", "conversations.parquet"
STAGES = ("before", "supervised", "preferred", "after")
DURING = "during"
"""The stage of measurements between steps of RL."""
STATUSES = ("running", "finished", "interrupted", "failed")


class RunError(ValueError):
    """A path or file that is not part of a run folder; the message says what to change."""


class RunFolder:
    """One run's folder, for writing (`create`, `resume`) and for reading (`open`)."""

    def __init__(self, path: Path, summary: Record, clock: Callable[[], float]) -> None:
        """Use `create`, `resume` or `open`; clock gives seconds and need not start anywhere in particular."""
        self.path = path
        self.moved_aside: Path | None = None
        self._summary = summary
        self._clock = clock
        self._began: float | None = None
        self._lines: TextIO | None = None
        self._writer: ScalarWriter | None = None

    @classmethod
    def create(
        cls,
        path: Path | str,
        recipe_toml: str,
        name: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        id: str | None = None,
    ) -> Self:
        """Start a run at path. A run that lies there moves to `<path>-1`, `-2`, …; see `moved_aside`.

        Args:
            id: that of a run which goes on without its folder; a new one otherwise.

        Raises:
            RunError: path is a file, or a folder that holds something other than a run.
        """
        path = Path(path)
        aside = _move_aside(path) if holds_run(path) else None
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, _new_summary(name, id or _new_id(), aside), clock)
        run.moved_aside = aside
        run._began = clock()
        replace_file(path / RECIPE, recipe_toml.encode())
        (path / METRICS).touch()
        run._save()
        return run

    @classmethod
    def open(cls, path: Path | str, clock: Callable[[], float] = time.monotonic) -> Self:
        """The run at path, to read.

        Raises:
            RunError: path is no folder, or has no readable summary.json.
        """
        path = Path(path)
        return cls(path, _read_summary(path), clock)

    @classmethod
    def resume(cls, path: Path | str, clock: Callable[[], float] = time.monotonic, *, id: str | None = None) -> Self:
        """The run at path, to go on with: it is running again, and its time goes on from where it stopped.

        Args:
            id: for a folder that says none.

        Raises:
            RunError: as `open`.
        """
        run = cls.open(path, clock)
        run.update(status="running", error=None, id=run.id or id or _new_id())
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close as finished, as interrupted (Ctrl-C, exit) or as failed with the error's own words."""
        if self._summary["status"] != "running":
            self._release()
        elif error is None:
            self.close("finished")
        elif isinstance(error, Exception):
            self.close("failed", f"{type(error).__name__}: {error}")
        else:
            self.close("interrupted")

    def log(self, phase: str, step: int, metrics: Mapping[str, float | str]) -> None:
        """Append one line to metrics.jsonl and the numbers to TensorBoard as `<phase>/<name>`.

        The line's own fields (phase, step, time) win over metrics of the same name. NaN and infinities, which JSON
        lacks, are written as null.
        """
        values = {key: _plain(value) for key, value in metrics.items()}
        line = {**values, "phase": phase, "step": int(step), "time": round(self.seconds(), 3)}
        lines = self._metrics_file()
        lines.write(json.dumps({key: _json_value(value) for key, value in line.items()}) + "\n")
        lines.flush()
        self._scalars(phase, step, values)

    def rollouts(self, step: int, rows: Sequence[Row]) -> Path:
        """Write the rollouts of one step; rows have ROLLOUT_COLUMNS, and may have more."""
        return write_table(self.path / "rollouts" / f"step-{step:06d}.parquet", rows, ROLLOUT_COLUMNS)

    def evaluation(self, stage: str, rows: Sequence[Row]) -> Path:
        """Write one evaluation's completions; rows have EVALUATION_COLUMNS, and may have more."""
        return write_table(self.path / "evals" / f"{stage}.parquet", rows, EVALUATION_COLUMNS)

    def keep(self, name: str, table: pa.Table) -> Path:
        """Write what a phase learns from, COMPARISONS or CONVERSATIONS, which a run that goes on reads again."""
        return write_arrow(self.path / name, table)

    def kept(self, name: str) -> pa.Table | None:
        """Read what `keep` wrote; None where there is nothing.

        Raises:
            RunError: when it cannot be read.
        """
        try:
            return pq.read_table(self.path / name)
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{self.path / name} cannot be read, and a run goes on with it: {error}") from error

    def update(self, **fields: object) -> None:
        """Set fields of summary.json; the others stay."""
        self._summary.update(fields)
        self._save()

    def close(self, status: str, error: str | None = None) -> None:
        """Record how the run ended and let its files go. Logging again reopens them.

        Raises:
            RunError: status is none of STATUSES.
        """
        if status not in STATUSES:
            raise RunError(f"a run cannot end as {status!r}: use one of {', '.join(STATUSES)}")
        self._release()
        self.update(status=status, error=error)

    def change(self, recipe_toml: str, step: int, changed: Mapping[str, tuple[object, object]]) -> None:
        """Record the recipe that holds from a step on, and of each key that changed the old and the new value."""
        replace_file(self.path / RECIPE, recipe_toml.encode())
        lines = [{"step": step, "key": key, "old": old, "new": new} for key, (old, new) in changed.items()]
        if lines:
            self.update(changes=[*self._summary.get("changes", []), *lines])

    def seconds(self) -> float:
        """Seconds since the run started, time spent stopped left out."""
        if self._began is None:
            self._began = self._clock() - self._spent()
        return self._clock() - self._began

    @property
    def id(self) -> str | None:
        """What tells the run from all others; its checkpoints have it, too. None in folders of older versions."""
        found: str | None = self._summary.get("id")
        return found

    def summary(self) -> Record:
        """A copy of summary.json's fields."""
        return dict(self._summary)

    def recipe(self) -> str | None:
        """The resolved recipe's text, or None where the file is missing."""
        path = self.path / RECIPE
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def metrics(self) -> list[Record]:
        """All lines of metrics.jsonl, null read as NaN.

        A half-written last line is left out. A resumed run repeats the steps after its last checkpoint; of two lines
        of the same phase, step and stage the later one stands.

        Raises:
            RunError: a line other than the last cannot be read.
        """
        records: dict[tuple[object, ...], Record] = {}
        for record in _parse_lines(self.path / METRICS):
            key = (record.get("phase"), record.get("step"), record.get("stage"))
            records.pop(key, None)
            records[key] = record
        return list(records.values())

    def evaluations(self) -> dict[str, list[Record]]:
        """Rows of each evaluation by stage, in order; those between steps of RL are called by their step."""
        order = (*STAGES[:-1], "", STAGES[-1])
        stages = {path.stem: path for path in parquet_files(self.path / "evals")}
        named = sorted(stages, key=lambda stage: (order.index(stage if stage in order else ""), stage))
        return {stage: read_rows(stages[stage]) for stage in named}

    def last_rollouts(self, n: int = 1) -> list[Record]:
        """Rows of the last n steps that have rollouts, oldest step first."""
        files = parquet_files(self.path / "rollouts")
        return [row for path in files[max(0, len(files) - n) :] for row in read_rows(path)]

    def _spent(self) -> float:
        times = [float(record.get("time", 0.0)) for record in _parse_lines(self.path / METRICS)]
        return max([float(self._summary.get("seconds") or 0.0), *times])

    def _save(self) -> None:
        self._summary["seconds"] = round(self.seconds(), 3)
        text = json.dumps(_json_value(self._summary), indent=2, ensure_ascii=False) + "\n"
        replace_file(self.path / SUMMARY, text.encode())

    def _metrics_file(self) -> TextIO:
        if self._lines is None:
            cut_half_line(self.path / METRICS)
            self._lines = (self.path / METRICS).open("a", encoding="utf-8")
        return self._lines

    def _scalars(self, phase: str, step: int, values: Mapping[str, float | str]) -> None:
        if self._writer is None:
            self._writer = ScalarWriter(self.path / "tensorboard")
        self._writer.add({f"{phase}/{k}": v for k, v in values.items() if not isinstance(v, str)}, step)

    def _release(self) -> None:
        for file in (self._lines, self._writer):
            if file is not None:
                with suppress(OSError):  # of a line that could not be written, which was said then
                    file.close()
        self._lines = self._writer = None


def _new_id() -> str:
    return uuid.uuid4().hex


def _new_summary(name: str, id: str, aside: Path | None) -> Record:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    summary: Record = {"id": id, "name": name, "status": "running", "error": None, "started": started, "seconds": 0.0}
    summary |= {"software": {}, "machine": {}, "split": {}, "rows": [], "speed": {}}
    return summary if aside is None else summary | {"moved_aside": aside.name}


def _read_summary(path: Path) -> Record:
    if not path.is_dir():
        raise RunError(f"{path} is not a folder: give the folder of a run, the one that holds {SUMMARY}")
    if not (path / SUMMARY).is_file():
        raise RunError(f"{path} holds no {SUMMARY}: give the folder of a run, such as runs/quickstart")
    try:
        summary = json.loads((path / SUMMARY).read_bytes())
    except ValueError as error:
        raise RunError(f"{path / SUMMARY} is not JSON ({error}): restore it, or run again") from error
    if not isinstance(summary, dict):
        raise RunError(f"{path / SUMMARY} holds a {type(summary).__name__}, not an object: restore it, or run again")
    return {"name": path.name, "status": "running"} | summary


def holds_run(path: Path) -> bool:
    """Whether a run lies at path, in whatever state; otherwise nothing does, and one can start there.

    Raises:
        RunError: path is a file, or a folder that holds something other than a run.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, and a run needs a folder: choose another path")
    if not path.exists() or not any(path.iterdir()):
        return False
    if not any((path / name).exists() for name in (SUMMARY, METRICS, RECIPE)):
        raise RunError(f"{path} holds files that are not a run's: choose an empty or a new folder")
    return True


def _move_aside(path: Path) -> Path:
    """Make way for a new run at path; returns the place that the old one moved to."""
    number = 1
    while (aside := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def _plain(value: object) -> float | str:
    """A metric as a Python number or text; NumPy's and torch's scalars become floats."""
    if isinstance(value, str | int | float):
        return value
    return float(value)  # type: ignore[arg-type]


def _json_value(value: object) -> object:
    """Value with NaN and infinities as null, containers included."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    return [_json_value(item) for item in value] if isinstance(value, list | tuple) else value


def _parse_lines(path: Path) -> list[Record]:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError as error:
            if number == len(lines):
                break
            raise RunError(f"{path} line {number} is not JSON ({error}): remove or restore that line") from error
        if record:
            records.append({key: math.nan if value is None else value for key, value in record.items()})
    return records
