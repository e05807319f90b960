"""Stores an evaluation's completions and verdicts as JSON lines in a folder, from which a killed evaluation resumes.

Lines are appended as completions end, and put in order when all have. Settings that the completions depend on lie
beside them, so that an evaluation never goes on from another's. They are written with the first completions: an
evaluation that fails before leaves nothing that would refuse the corrected one.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.cluster.atomic_files import cut_half_line, replace_file
from lockstep.data.row_reader import read_rows
from lockstep.data.tasks.difficulty.pass_rates import COUNTS

SETTINGS, COMPLETIONS, SUMMARY = "settings.json", "completions.jsonl", "summary.json"

Answer = Mapping[str, Any]
"""A line: `mode`, `problem` and `sample` say which completion it is."""


class OtherSettings(ValueError):
    """A folder that holds the completions of an evaluation with other settings, or something else."""


class AnswerFolder:
    """The folder of one evaluation: settings, completions, counts for each problem, summary."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Begin in an empty or new folder, or go on in one that was begun with the same settings.

        Raises:
            OtherSettings: names the first setting that differs.
            BadRow: for a broken line, with its file and number.
        """
        self.path = path
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._check_ours()
        cut_half_line(path / COMPLETIONS)
        rows = read_rows(str(path / COMPLETIONS)) if (path / COMPLETIONS).exists() else ()
        self._answers = {_place(row.values): row.values for row in rows}
        if self._answers:
            self._check_settings()

    def __len__(self) -> int:
        """Completions that are there."""
        return len(self._answers)

    def has(self, mode: str, problem: int, sample: int) -> bool:
        """Whether the folder has this completion."""
        return (mode, problem, sample) in self._answers

    def add(self, answers: Iterable[Answer]) -> None:
        """Append completions; those that are there already are left out."""
        new = {_place(a): a for a in answers if _place(a) not in self._answers}
        if not new:
            return
        if not self._answers:
            replace_file(self.path / SETTINGS, (json.dumps(self._settings, indent=2) + "\n").encode())
        with (self.path / COMPLETIONS).open("a", encoding="utf-8") as file:
            file.write(_lines(new.values()))
        self._answers |= new

    def of(self, mode: str) -> Iterator[tuple[int, list[Answer]]]:
        """Each problem with its completions, in order."""
        found: dict[int, list[Answer]] = {}
        for place in sorted(self._answers):
            if place[0] == mode:
                found.setdefault(place[1], []).append(self._answers[place])
        return iter(found.items())

    def finish(self, counts: Sequence[Answer], summary: Mapping[str, Any]) -> None:
        """Sort the completions, and write counts and summary beside them."""
        ordered = [self._answers[place] for place in sorted(self._answers)]
        replace_file(self.path / COMPLETIONS, _lines(ordered).encode())
        replace_file(self.path / COUNTS, _lines(counts).encode())
        replace_file(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())

    def _check_ours(self) -> None:
        """Refuse a folder, or a file, that holds something other than an evaluation."""
        if (self.path / SETTINGS).exists() or not self.path.exists():
            return
        if not self.path.is_dir() or any(self.path.iterdir()):
            raise OtherSettings(f"{self.path} is there and holds no evaluation: give another folder")

    def _check_settings(self) -> None:
        """Refuse completions that were made with other settings."""
        there = _flat(json.loads((self.path / SETTINGS).read_text(encoding="utf-8")))
        here = _flat(self._settings)
        for key in here | there:
            if there.get(key) != here.get(key):
                raise OtherSettings(
                    f"{self.path} was begun with {key}={there.get(key)!r}, and now it is {here.get(key)!r}: make them "
                    "equal to go on, or give another folder"
                )


def _place(answer: Answer) -> tuple[str, int, int]:
    return answer["mode"], answer["problem"], answer["sample"]


def _lines(rows: Iterable[Answer]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
