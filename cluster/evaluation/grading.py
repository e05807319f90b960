"""Grades a file of answers as a stream: one verdict for each row, in order, as soon as it is known.

A row that cannot be read is ungradable and says where and why; the others are graded all the same.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from queue import Queue
from threading import Thread
from typing import Any, Literal, Protocol

from lockstep.data.tasks.code_tests import Case, CodeTests
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.verifiers.answer_pool import AnswerPool, AnswerPoolError
from lockstep.rl.verifiers.judge import grader_of
from lockstep.rl.verifiers.math import grader
from lockstep.rl.verifiers.math.extraction import RULES, candidates

Task = Literal["math", "code", "gym"]
_AHEAD = 16


class BadRow(ValueError):
    """A row that cannot be graded; the message names the field and what is wrong with it."""


@dataclass(frozen=True)
class Row:
    """One line of the file: the item that a pool grades, or what is wrong with the line."""

    line: int
    item: tuple[str, Any] | None = None
    problem: str = ""
    name: Any = None
    """The row's `id`, if it has one."""


@dataclass(frozen=True)
class Graded:
    """A row with its verdict; in an audit, also the answer and the verdict by each rule of extraction."""

    row: Row
    verdict: Verdict
    rules: dict[str, tuple[str, Verdict]] = field(default_factory=dict)

    @property
    def disagree(self) -> bool:
        """Whether the rules of extraction lead to different outcomes."""
        return len({verdict.outcome for _, verdict in self.rules.values()}) > 1

    def as_json(self, *, audit: bool) -> str:
        """One line of JSON."""
        values: dict[str, Any] = {"line": self.row.line} | ({} if self.row.name is None else {"id": self.row.name})
        values |= {"outcome": self.verdict.outcome, "reward": self.verdict.reward}
        values |= {"extracted": self.verdict.extracted, "reason": self.verdict.reason}
        if audit:
            rules = {name: {"answer": text, "outcome": v.outcome} for name, (text, v) in self.rules.items()}
            values |= {"rules": rules, "disagree": self.disagree}
        return json.dumps(values)


class Pool(Protocol):
    """A pool of killable processes that grade; threads may share it."""

    def grade(self, items: Any) -> list[Verdict]:
        """One verdict for each item, in order."""
        ...


@contextmanager
def pool_for(task: Task, workers: int, deadline: float, say: Callable[[str], None]) -> Iterator[Pool]:
    """The pool that grades a task's items; that for code reports which isolation the sandbox has.

    Raises:
        ValueError: where the pool cannot start or loses its processes, in one sentence.
    """
    opened: AbstractContextManager[Any]
    match task:
        case "math":
            opened = AnswerPool(workers, deadline)
        case "gym":
            opened = AnswerPool(workers, deadline, grader_of("gym"), examples=())
        case "code":
            opened = _code_pool(workers, deadline, say)
    try:
        with opened as pool:
            yield pool
    except AnswerPoolError as error:
        raise ValueError(str(error)) from error


@contextmanager
def _code_pool(workers: int, deadline: float, say: Callable[[str], None]) -> Iterator[Pool]:
    from lockstep.rl.sandbox.isolation import SandboxError, SandboxLimits
    from lockstep.rl.verifiers.code_pool import CodePool

    try:
        with CodePool(workers, SandboxLimits(seconds=deadline)) as pool:
            say(str(pool.isolation))
            yield pool
    except SandboxError as error:
        raise ValueError(str(error)) from error


@contextmanager
def auditor(workers: int, deadline: float) -> Iterator[Callable[[Row, Verdict], Graded]]:
    """A function that adds to a row's verdict the answer and verdict by each rule of extraction."""
    with AnswerPool(workers, deadline, grader.grade_stated) as pool:

        def audit(row: Row, verdict: Verdict) -> Graded:
            if row.item is None:
                return Graded(row, verdict)
            response, answer = row.item
            found = candidates(response)
            verdicts = pool.grade([(text, answer) for text in found.values()])
            return Graded(row, verdict, dict(zip(found, zip(found.values(), verdicts, strict=True), strict=True)))

        yield audit


def grade_rows(
    rows: Iterable[Row], pool: Pool, workers: int, finish: Callable[[Row, Verdict], Graded] = Graded
) -> Iterator[Graded]:
    """Grade rows in several threads; yields verdicts in the order of the rows, each as soon as it is known.

    A thread reads rows ahead of the verdicts, a few for each worker, so that a file of any size takes little memory and
    a slow writer at the other end of a pipe still sees each verdict.
    """
    waiting: Queue[Future[Graded] | BaseException | None] = Queue(_AHEAD * workers)

    def one(row: Row) -> Graded:
        verdict = Verdict(Outcome.ungradable, row.problem) if row.item is None else pool.grade([row.item])[0]
        return finish(row, verdict)

    with ThreadPoolExecutor(workers, thread_name_prefix="grading") as threads:

        def read() -> None:
            try:
                for row in rows:
                    waiting.put(threads.submit(one, row))
                waiting.put(None)
            except BaseException as error:  # it is raised where the rows are waited for
                waiting.put(error)

        Thread(target=read, name="reading", daemon=True).start()
        while (next_one := waiting.get()) is not None:
            if isinstance(next_one, BaseException):
                raise next_one
            yield next_one.result()


def read_rows(lines: Iterable[bytes], name: str, task: Task) -> Iterator[Row]:
    """Parse JSON lines into rows; empty lines are skipped. name: of the file, for messages on bad rows."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = _parsed(line)
            yield Row(number, _item(values, task), name=values.get("id"))
        except BadRow as error:
            yield Row(number, problem=f"{name}:{number}: {error}")


def summary(graded: Counter[str], bad: int) -> str:
    """Counts of the verdicts, as one sentence."""
    total = sum(graded.values())
    decided = graded[Outcome.correct] + graded[Outcome.incorrect]
    share = f" ({graded[Outcome.correct] / decided:.1%} of those that could be graded)" if decided else ""
    lost = f"{graded[Outcome.ungradable]} ungradable" + (f", of which {bad} bad rows" if bad else "")
    return f"{total} rows: {graded[Outcome.correct]} correct{share}, {graded[Outcome.incorrect]} incorrect, {lost}"


def audit_summary(graded: Iterable[Graded]) -> list[str]:
    """A line for each rule of extraction: how often it finds an answer, is right, and differs from the verdict."""
    rows = list(graded)
    lines = [f"rules disagree on {sum(row.disagree for row in rows)} of {len(rows)} rows"]
    for rule in RULES:
        found = [(row.verdict, row.rules[rule][1]) for row in rows if rule in row.rules]
        right = sum(own.outcome is Outcome.correct for _, own in found)
        other = sum(own.outcome is not verdict.outcome for verdict, own in found)
        lines.append(f"{rule}: finds {len(found)}, {right} correct, {other} unlike the verdict")
    return lines


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"this is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise BadRow(f"a row is an object with fields, not {type(values).__name__}")
    return values


def _item(values: dict[str, Any], task: Task) -> tuple[str, Any]:
    match task:
        case "math":
            return _text(values, "response"), _text(values, "answer", numbers=True)
        case "gym":
            entry = values.get("answer")
            return _text(values, "response"), json.dumps(entry) if isinstance(entry, dict) else _text(values, "answer")
        case "code":
            return _text(values, "completion"), _tests(values)


def _text(values: dict[str, Any], name: str, *, numbers: bool = False) -> str:
    if name not in values:
        raise BadRow(f"the field {name!r} is missing")
    value = values[name]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"the field {name!r} is {type(value).__name__}, and has to be a string")
    return value


def _tests(values: dict[str, Any]) -> CodeTests:
    """Tests as a program, as a list of assertions, or as a list of objects with `stdin` and `stdout`."""
    tests, entry_point = values.get("tests"), _text({"entry_point": ""} | values, "entry_point")
    prefix = _text({"prefix": ""} | values, "prefix")
    if isinstance(tests, list) and tests and all(isinstance(test, dict) for test in tests):
        cases = tuple(Case(_text(test, "stdin"), _text(test, "stdout")) for test in tests)
        return CodeTests(cases=cases, entry_point=entry_point, prefix=prefix)
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    program = _text(values | {"tests": tests} if "tests" in values else values, "tests")
    return CodeTests(program, entry_point, prefix)
