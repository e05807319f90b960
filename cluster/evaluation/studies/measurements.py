"""Keeps measurements as JSON lines, one for each model, place and seed, so that an interrupted study goes on."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.cluster.atomic_files import cut_half_line
from lockstep.cluster.evaluation.studies.study import Values
from lockstep.data.row_reader import read_rows

FILE = "measurements.jsonl"


@dataclass(frozen=True)
class Cell:
    """What a measurement is of."""

    study: str
    checkpoint: str
    weights: str
    """Their digest: another model of the same name is measured anew."""
    settings: str
    """Digest of all settings but the places and the number of seeds."""
    place: float
    seed: int


@dataclass(frozen=True)
class Measurement:
    """A cell with what was measured in it."""

    cell: Cell
    values: Values

    def numbers(self) -> Mapping[str, float]:
        """Measures that are numbers; null, which JSON has in the place of NaN, is one."""
        numeric = {key: value for key, value in self.values.items() if value is None or isinstance(value, int | float)}
        return {key: float("nan") if value is None else float(value) for key, value in numeric.items()}


class MeasurementFile:
    """The measurements of a folder; those of other settings stay where they are."""

    def __init__(self, folder: Path) -> None:
        """Read what is there; half a line at the end, of a study that was killed, is cut off.

        Raises:
            BadRow: for a line that is no JSON object, with its number.
            ValueError: for a line that is no measurement.
        """
        self._path = folder / FILE
        cut_half_line(self._path)
        rows = read_rows(str(self._path)) if self._path.exists() else ()
        self._found = {each.cell: each for each in (_measurement(row.values, self._path) for row in rows)}

    def get(self, cell: Cell) -> Measurement | None:
        """The measurement of a cell, if it was made."""
        return self._found.get(cell)

    def add(self, measurement: Measurement) -> None:
        """Append a measurement to the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(measurement.cell) | {"values": _plain(measurement.values)}) + "\n")
        self._found[measurement.cell] = measurement

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self._found.values())


def _measurement(row: Mapping[str, Any], path: Path) -> Measurement:
    try:
        return Measurement(Cell(**{name: row[name] for name in Cell.__dataclass_fields__}), row["values"])
    except KeyError as error:
        raise ValueError(f"{path} has a line without {error}, so it is no study's: give another folder") from error


def _plain(values: Values) -> Values:
    """As JSON, which has no NaN and no infinities: null."""
    return {k: None if isinstance(v, float) and v - v != 0 else v for k, v in values.items()}
