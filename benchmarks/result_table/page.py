"""The table of docs/results.md, made of the rows alone: a part for each kind of machine and commit."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lockstep.cluster.atomic_files import replace_file
from result_table.intervals import interval
from result_table.methods import METHODS, ROOT, SEEDS, TASKS, is_reproducible
from result_table.rows import Counts, Row

PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- table: python benchmarks/results.py table -->", "<!-- end of the table -->"
EMPTY = "There are no rows yet."
SHOWN = 12
"""Hexadecimal digits of a digest in the table; all of them are in the rows."""


def write_page(page: Path, rows: Sequence[Row]) -> None:
    """Put the table of all rows between the two marker lines of a page; the rest of it stays.

    Raises:
        ValueError: where a marker is missing.
    """
    replace_file(page, page_with(page.read_text(encoding="utf-8"), rows).encode())


def page_with(text: str, rows: Sequence[Row]) -> str:
    """The text of a page with the table of these rows.

    Raises:
        ValueError: as `write_page`.
    """
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end:
        raise ValueError(
            f"the page lacks one of the lines {BEGIN!r} and {END!r}, between which the table stands: add it"
        )
    return f"{before}{begin}\n{tables(rows)}\n\n{end}{after}"


def tables(rows: Sequence[Row]) -> str:
    """Markdown of all rows; those of one machine and commit stand together, and no mean is over several of them."""
    parts = []
    for some in _grouped(rows, lambda row: (row.machine, row.commit)):
        parts += [_heading(some)]
        for each in sorted(_grouped(some, lambda row: row.task), key=lambda each: _order(TASKS, each[0].task)):
            parts += [f"**{each[0].task}**, held-out accuracy", _accuracies(each), _digests(each)]
    return "\n\n".join(parts) or EMPTY


def _heading(rows: Sequence[Row]) -> str:
    commit, _, changes = rows[0].commit.partition("+")
    dates = sorted({row.date for row in rows})
    said = f"commit {commit[:12]}{' with changes that are not committed' if changes else ''}"
    torch = " and ".join(sorted({row.versions["torch"] for row in rows}))
    made = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"### {rows[0].machine}\n\nMade {made} at {said} with torch {torch}."


def _accuracies(rows: Sequence[Row]) -> str:
    """A line for the beginning, for what the supervised steps made of it, and for each method."""
    lines = ["| method | seeds | accuracy | 95% interval | correct, by seed | seconds |", "| --- " * 6 + "|"]
    methods = _methods(rows)
    first = [row for some in reversed(methods) for row in some]  # of a seed the first method's stands
    begun = {row.seed: row.before for row in first}
    shared = {row.seed: row.supervised for row in first if row.supervised}
    for name, counts in (("base model", begun), ("supervised steps of all", shared)):
        if counts:
            lines.append(_line(name, counts, "–"))
    for some in methods:
        seconds = f"{statistics.fmean(row.seconds for row in some):.0f}"
        lines.append(_line(some[0].method, {row.seed: row for row in some}, seconds))
    return "\n".join(lines)


def _line(name: str, counts: dict[int, Counts], seconds: str) -> str:
    by_seed = [counts[seed] for seed in sorted(counts)]
    mean, low, high = interval(by_seed)
    short = f" of {len(SEEDS)}" if len(counts) < len(SEEDS) else ""
    kind = ", Wilson" if len(counts) == 1 else ""
    correct = ", ".join(f"{each.correct}/{each.graded}" for each in by_seed)
    cells = (name, f"{len(counts)}{short}", f"{mean:.1%}", f"{low:.1%} to {high:.1%}{kind}", correct, seconds)
    return f"| {' | '.join(cells)} |"


def _digests(rows: Sequence[Row]) -> str:
    """The final weights of each method and seed."""
    seeds = sorted({row.seed for row in rows})
    lines = [f"| weights | {' | '.join(f'seed {seed}' for seed in seeds)} |", "| --- " * (len(seeds) + 1) + "|"]
    for some in _methods(rows):
        found = {row.seed: f"`{row.digest[:SHOWN]}`" for row in some}
        if not is_reproducible(some[0].method):
            found = dict.fromkeys(found, "not reproducible")
        lines.append(f"| {some[0].method} | {' | '.join(found.get(seed, '–') for seed in seeds)} |")
    return "\n".join(lines)


def _methods(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each method, by seed."""
    groups = _grouped(sorted(rows, key=lambda row: row.seed), lambda row: row.method)
    return sorted(groups, key=lambda some: _order(METHODS, some[0].method))


def _order(known: Iterable[str], name: str) -> tuple[int, str]:
    """As they are listed; what is listed no more stands at the end."""
    names = list(known)
    return (names.index(name) if name in names else len(names), name)


def _grouped(rows: Sequence[Row], key: Callable[[Row], object]) -> list[list[Row]]:
    """Rows of the same key together, in the order in which keys first come."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())
