"""Problems with answers that a program can check, made offline by `reasoning-gym` or read from files.

Where a data set has no files of its own for both sides, training and held-out problems are disjoint by construction: a
hash of the problem, blind to the order of its numbers, says which side it belongs to, and duplicates are dropped.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lockstep.data.row_reader import is_source, read_rows
from lockstep.data.tasks.presets import PRESETS
from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.problem_formats import read_problem

HELD_OUT_SHARE = 5
"""One problem in this many belongs to the held-out side."""

_BETWEEN_SEEDS = 1_000_003
_ROUNDS = 4


class BadProblems(ValueError):
    """Problems that cannot be made, or are too few."""


class TaskConfig(BaseModel):
    """Where problems come from and how they are put to the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = Field("", description="a known data set, which decides the keys of this section that are not given")
    generator: str = Field("chain_sum", description="a data set of reasoning-gym, or files of problems")
    held_out_from: str = Field("", description="files of held-out problems; a hash of each problem decides otherwise")
    fields: dict[str, str] = Field({}, description="where files have question, answer, …, if not under known names")
    settings: dict[str, Any] = Field(default_factory=dict, description="arguments of the generator")
    train: int = Field(2000, ge=1, description="training problems at most")
    held_out: int = Field(200, ge=1, description="held-out problems at most")
    prompt: str = Field(
        "{question}",
        description="what the model reads; {question} stands for the problem, {examples} for tests that it may see",
    )
    instruction: str = Field("", description="stands below the problem, after an empty line")
    system: str = Field("", description="stands before everything; in a chat it is the system's message")
    shots: int = Field(0, ge=0, description="training problems that are shown before it with their completions")
    completion: str = Field(
        "{answer}",
        description="what solved examples show and supervised tuning teaches, of {answer}, {solution} and {program}",
    )
    grader: Literal["answer", "gym"] = Field(
        "answer", description="what decides where there are no tests; gym: reasoning-gym's scores, with partial credit"
    )
    chat: bool = Field(True, description="put the prompt into the tokenizer's chat template")
    stop: list[str] = Field([], description="texts at which a completion ends")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """The preset's keys, and over them those that are given."""
        if not isinstance(values, dict) or not values.get("preset"):
            return values
        if values["preset"] not in PRESETS:
            raise ValueError(f"task.preset={values['preset']!r} is not known: use one of {', '.join(PRESETS)}")
        return dict(PRESETS[values["preset"]].values) | values

    @model_validator(mode="after")
    def _fits_together(self) -> "TaskConfig":
        if "{question}" not in self.prompt:
            raise ValueError(f"task.prompt={self.prompt!r} has no place for the problem: write {{question}} into it")
        if self.grader == "gym" and (self.held_out_from or is_source(self.generator)):
            raise ValueError("task.grader='gym' scores what reasoning-gym made, and these problems come from files")
        return self


@dataclass(frozen=True)
class Split:
    """Training and held-out problems, and how they were kept apart."""

    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    method: str
    shots: tuple[Problem, ...] = ()
    """Training problems to show solved, one more than the task asks for, so that none has to show itself."""

    @property
    def overlap(self) -> int:
        """Problems that stand on both sides, up to the order of their numbers."""
        return len({key(p.question) for p in self.train} & {key(p.question) for p in self.held_out})

    @property
    def has_programs(self) -> bool:
        """Whether tests decide on a problem of either side."""
        return any(p.tests for p in (*self.train, *self.held_out))


def key(question: str) -> str:
    """A problem up to the order of its words and numbers, so that 1 + 2 and 2 + 1 count as one."""
    return " ".join(sorted(question.split()))


def make_split(task: TaskConfig, seed: int) -> Split:
    """Problems for both sides, a pure function of (task, seed).

    Raises:
        BadRow: names the file, line and field of a row that cannot be used.
        BadProblems: for an unknown generator, bad settings, or when a side stays empty.
    """
    if task.held_out_from:
        train = tuple(_numbered(islice(_stream(task, seed), task.train)))
        held_out = held_out_problems(task, seed)
        method = "Training and held-out problems come from files of their own, and nothing is left out of either."
    else:
        train, held_out = _by_hash(task, seed)
        method = (
            f"A hash of each problem, blind to the order of its numbers, sends one in {HELD_OUT_SHARE} to the held-out "
            "side and the others to training; duplicates are dropped, so no problem stands on both sides."
        )
    for side, problems in (("training", train), ("held-out", held_out)):
        if not problems:
            raise BadProblems(f"{task.generator} gave no {side} problems: widen task.settings")
    return Split(train, held_out, method, draw_shots(task, train, seed))


def held_out_problems(task: TaskConfig, seed: int) -> tuple[Problem, ...]:
    """The held-out side of a split alone; training problems that have a file of their own are not read.

    Raises:
        ValueError: as `make_split`.
    """
    if not task.held_out_from:
        return make_split(task, seed).held_out
    return tuple(_numbered(islice(read_problems(task.held_out_from, task.fields), task.held_out)))


def read_problems(source: str, fields: Mapping[str, str]) -> Iterator[Problem]:
    """Problems of a file, a folder or files on the Hub, in order; see `problem_shapes`.

    Raises:
        BadRow: names file, line and field.
    """
    return (read_problem(index, row, fields) for index, row in enumerate(read_rows(source)))


def draw_shots(task: TaskConfig, train: Sequence[Problem], seed: int) -> tuple[Problem, ...]:
    """Training problems to show solved before each problem; a function of (task, seed), the same for all problems.

    Raises:
        BadProblems: when there are fewer than the task shows.
    """
    if len(train) < task.shots:
        raise BadProblems(
            f"task.shots={task.shots} solved problems are to be shown, and {len(train)} are there to train"
        )
    order = sorted(train, key=lambda problem: xxhash.xxh3_64_intdigest(f"{seed} {problem.question}".encode()))
    return tuple(order[: task.shots + 1]) if task.shots else ()


def _by_hash(task: TaskConfig, seed: int) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Distinct problems for training and held out."""
    sides: dict[bool, list[Problem]] = {True: [], False: []}
    wanted = {True: task.held_out, False: task.train}
    seen: set[str] = set()
    for problem in _stream(task, seed):
        name = key(problem.question)
        side = xxhash.xxh3_64_intdigest(name.encode()) % HELD_OUT_SHARE == 0
        if name not in seen and len(sides[side]) < wanted[side]:
            seen.add(name)
            sides[side].append(problem)
        if all(len(sides[s]) >= wanted[s] for s in sides):
            break
    return tuple(_numbered(sides[False])), tuple(_numbered(sides[True]))


def _numbered(problems: Iterable[Problem]) -> Iterator[Problem]:
    return (replace(problem, index=index) for index, problem in enumerate(problems))


def _stream(task: TaskConfig, seed: int) -> Iterator[Problem]:
    return read_problems(task.generator, task.fields) if is_source(task.generator) else _made(task, seed)


def _made(task: TaskConfig, seed: int) -> Iterator[Problem]:
    """Problems of reasoning-gym, until a small space of problems has given what it has."""
    import reasoning_gym  # takes a second, which only who makes problems has to wait

    per_round = 2 * (task.train + (0 if task.held_out_from else HELD_OUT_SHARE * task.held_out))
    for batch in range(_ROUNDS):
        # reasoning-gym draws problem i from seed + i, so rounds and seeds must lie further apart than a round is long
        first = seed * _BETWEEN_SEEDS + batch * per_round
        settings = task.settings | {"seed": first % (1 << 31), "size": per_round}
        try:
            made = reasoning_gym.create_dataset(task.generator, **settings)
        except (TypeError, ValueError, AssertionError) as error:
            raise BadProblems(f"task.generator={task.generator!r} with {task.settings}: {error}") from error
        yield from (Problem(0, entry["question"], str(entry["answer"]), entry=entry) for entry in made)
