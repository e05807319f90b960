"""Makes the table of docs/results.md: methods from one start, with the digest of the weights that each ends with.

    python benchmarks/results.py row --task sums --method grpo --seed 0
    python benchmarks/results.py row --task sums --method grpo --seed 0 --again
    python benchmarks/results.py rows --seeds 0-4
    python benchmarks/results.py table

`row` trains a run by `lockstep train` and appends its result to docs/results.jsonl. One that is there, of the same
sources and kind of machine, is not run again; with `--again` it is, and the digests of the final weights are compared,
which is what a second machine is for. `rows` makes all that are missing, and `table` writes them into docs/results.md.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from result_table.machine import commit, few_cores, this_machine
from result_table.measured import RunFailed, drop_weights, read_row, train, weights_digest
from result_table.methods import METHODS, RECIPE, ROOT, SEEDS, TASKS, is_reproducible, settings_of
from result_table.page import PAGE, write_page
from result_table.rows import ROWS, Place, Row, append_row, find_row, read_rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 1 for digests that differ and runs that failed, 2 for bad input."""
    args = _parser().parse_args(arguments)
    try:
        code: int = args.command(args)
        return code
    except RunFailed as error:
        return _said(error, 1)
    except (ValueError, OSError) as error:
        return _said(error, 2)
    except KeyboardInterrupt:
        return _said("interrupted: the row that was being made was not appended", 130)


def make_row(args: argparse.Namespace) -> int:
    """Make a row that is missing, or compare one that is there with another run of it."""
    with few_cores():
        return _row(args, args.task, args.method, args.seed)


def make_rows(args: argparse.Namespace) -> int:
    """Make all rows that are missing, one seed after the other; one that fails is named, and the others are made."""
    wanted = [(t, m, s) for s in args.seeds for t in args.task or TASKS for m in args.method or METHODS]
    for each in wanted:
        settings_of(*each)
    failed: list[str] = []
    with few_cores():
        for task, method, seed in wanted:
            try:
                _row(args, task, method, seed)
            except RunFailed as error:
                failed.append(f"{task}-{method}-{seed}")
                _said(error, 1)
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries these again", file=sys.stderr)
    return 1 if failed else 0


def make_table(args: argparse.Namespace) -> int:
    """Write the table of all rows into the page."""
    rows = read_rows(args.rows)
    write_page(args.page, rows)
    print(f"{args.page} has the {len(rows)} rows of {args.rows}")
    return 0


def show_digest(args: argparse.Namespace) -> int:
    """Print the digest of a run's final weights."""
    print(weights_digest(args.run))
    return 0


def _row(args: argparse.Namespace, task: str, method: str, seed: int) -> int:
    """Make one row; the cores that this process has now are the run's, too."""
    settings = settings_of(task, method, seed)
    if args.again and not is_reproducible(method):
        raise ValueError(
            f"{method} is not reproducible bit for bit, so there is no digest to compare: leave out --again"
        )
    if args.recipe.resolve() != RECIPE and args.rows.resolve() == ROWS:
        raise ValueError(f"{ROWS} has rows of {RECIPE}, and --recipe is {args.recipe}: give --rows another file, too")
    place = Place(task=task, method=method, seed=seed, commit=commit(), machine=this_machine())
    rows = read_rows(args.rows)
    known = find_row(rows, place)
    if args.again and not known:
        raise ValueError(_nothing_to_compare(rows, place))
    if known and not args.again:
        print(f"{_result(known)}, as it is in {args.rows}; --again runs it once more and compares")
        return 0
    made = _made(args, place, settings)
    if known:
        return _compare(known, made)
    append_row(args.rows, made)
    print(_result(made))
    return 0


def _made(args: argparse.Namespace, place: Place, settings: Sequence[str]) -> Row:
    """The row of a new run.

    Raises:
        RunFailed: as `train` and `read_row`, or when somebody has changed the sources meanwhile.
    """
    folder = args.runs.absolute() / place.name
    train(args.recipe, folder, settings)
    if commit() != place.commit:
        raise RunFailed(f"the sources changed while {place.name} ran, so its commit is unknown: no row was appended")
    row = read_row(folder, place)
    if not args.keep:
        drop_weights(folder)
    return row


def _compare(known: Row, made: Row) -> int:
    """Say whether two runs of a row ended with the same weights."""
    if known.digest == made.digest:
        print(f"same: {made.name} ended with {made.digest} again")
        return 0
    names = sorted(known.versions.keys() | made.versions.keys())
    pairs = [(name, known.versions.get(name, "none"), made.versions.get(name, "none")) for name in names]
    others = "".join(f"; {name} was {there} and is {here}" for name, there, here in pairs if there != here)
    print(f"different: {made.name} ended with {made.digest}, and on {known.date} with {known.digest}{others}")
    return 1


def _nothing_to_compare(rows: Sequence[Row], place: Place) -> str:
    same = [row for row in rows if row.name == place.name]
    others = "".join(f"; there is one of commit {row.commit[:12]} on {row.machine}" for row in same)
    return f"there is no row {place.name} of commit {place.commit[:12]} on {place.machine} to compare with{others}"


def _result(row: Row) -> str:
    counts = f"{row.correct} of {row.graded} correct, {row.before.correct} of {row.before.graded} before"
    return f"{row.name}: {row.accuracy:.1%} ({counts}), {row.seconds:.0f} s, weights {row.digest}"


def _said(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def _seeds(text: str) -> list[int]:
    """Seeds as in 0-4 or 0,2,3."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            raise argparse.ArgumentTypeError(f"{text!r} names no seeds: write 0-4, or 0,2,3")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    kept = argparse.ArgumentParser(add_help=False)
    kept.add_argument("--rows", type=Path, default=ROWS, help="file of the rows")
    makes = argparse.ArgumentParser(add_help=False, parents=[kept])
    makes.add_argument("--recipe", type=Path, default=RECIPE, help="what all rows have in common")
    makes.add_argument("--runs", type=Path, default=ROOT / "runs" / "results", help="folder of the runs")
    makes.add_argument("--keep", action="store_true", help="keep the weights, 0.5 GB a run")
    row = commands.add_parser("row", parents=[makes], help="make a row, if it is missing")
    row.add_argument("--task", required=True, help=f"one of {', '.join(TASKS)}")
    row.add_argument("--method", required=True, help=f"one of {', '.join(METHODS)}")
    row.add_argument("--seed", type=int, required=True)
    row.add_argument("--again", action="store_true", help="run one that is there again, and compare the digests")
    row.set_defaults(command=make_row)
    rows = commands.add_parser("rows", parents=[makes], help="make all rows that are missing")
    rows.add_argument("--task", nargs="+", help="all otherwise")
    rows.add_argument("--method", nargs="+", help="all otherwise")
    rows.add_argument("--seeds", type=_seeds, default=list(SEEDS), help="as in 0-4, which is the default, or 0,2,3")
    rows.set_defaults(command=make_rows, again=False)
    table = commands.add_parser("table", parents=[kept], help="write the table into the page")
    table.add_argument("--page", type=Path, default=PAGE, help="page with the two marker lines")
    table.set_defaults(command=make_table)
    digest = commands.add_parser("digest", help="print the digest of a run's final weights")
    digest.add_argument("run", type=Path)
    digest.set_defaults(command=show_digest)
    return parser


if __name__ == "__main__":
    sys.exit(main())
