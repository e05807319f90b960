"""Rows of docs/results.md as JSON lines: one a task, method, seed, commit and kind of machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lockstep.cluster.atomic_files import replace_file
from result_table.machine import Machine
from result_table.methods import ROOT

ROWS = ROOT / "docs" / "results.jsonl"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Counts(_Frozen):
    """Greedy answers to held-out problems: how many are correct, of how many, and how many have no verdict."""

    correct: int = Field(ge=0)
    problems: int = Field(ge=1)
    ungradable: int = Field(0, ge=0)

    @property
    def graded(self) -> int:
        """Answers with a verdict, of which accuracy is the share that is correct."""
        return self.problems - self.ungradable

    @property
    def share(self) -> float:
        """Of the answers with a verdict, how many are correct."""
        return self.correct / self.graded

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if not 0 < self.graded >= self.correct:
            raise ValueError(f"{self.correct} correct of {self.graded} graded problems cannot be")
        return self


class Place(_Frozen):
    """What a row is of: there is one for each."""

    task: str
    method: str
    seed: int = Field(ge=0)
    commit: str
    """The last that changed what a run depends on."""
    machine: Machine

    @property
    def name(self) -> str:
        """What the run is called."""
        return f"{self.task}-{self.method}-{self.seed}"


class Row(Counts, Place):
    """A run and its result; its own counts are those after the last phase."""

    accuracy: float
    before: Counts
    """Of the model that the run began with."""
    supervised: Counts | None
    """After the supervised steps, where something followed."""
    seconds: float = Field(gt=0)
    """Wall time of the run, its measurements included."""
    digest: str = Field(pattern="^[0-9a-f]{32}$")
    """Of the final weights, see `weights_digest`."""
    versions: dict[str, str]
    date: str

    @property
    def place(self) -> Place:
        """What it is of."""
        return Place(**{name: getattr(self, name) for name in Place.model_fields})

    @model_validator(mode="after")
    def _is_what_it_counts(self) -> Self:
        if abs(self.accuracy - self.share) > 1e-6:
            raise ValueError(f"accuracy {self.accuracy} is not {self.correct} of {self.graded}")
        return self


def read_rows(file: Path) -> list[Row]:
    """Read all rows, the oldest first; none where there is no file.

    Raises:
        ValueError: names the line that is no row, or that is of the same as an earlier one.
    """
    found: dict[Place, Row] = {}
    for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else [], start=1):
        try:
            row = Row.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise ValueError(
                f"{file} line {number} is no row ({where}: {first['msg']}): restore or remove it"
            ) from error
        if row.place in found:
            raise ValueError(f"{file} line {number} is of {row.name} again, as an earlier line: remove one of them")
        found[row.place] = row
    return list(found.values())


def append_row(file: Path, row: Row) -> None:
    """Add a row at the end, whole or not at all.

    Raises:
        ValueError: as `read_rows`; nothing is written then.
    """
    rows = [*read_rows(file), row]
    replace_file(file, "".join(f"{each.model_dump_json()}\n" for each in rows).encode())


def find_row(rows: Sequence[Row], place: Place) -> Row | None:
    """The row of a place, if it is there."""
    return next((row for row in rows if row.place == place), None)
