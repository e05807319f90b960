"""Problems with answers that a program can check, made offline by `reasoning-gym` or read from JSON lines.

Train and held-out problems are disjoint by construction: a hash of the problem, blind to the order of its numbers,
says which side it belongs to, and duplicates are dropped.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import reasoning_gym
import xxhash
from pydantic import BaseModel, ConfigDict, Field

HELD_OUT_SHARE = 5
"""One problem in this many belongs to the held-out side."""

_BETWEEN_SEEDS = 1_000_003


class BadProblems(ValueError):
    """Problems that cannot be made or read."""


class TaskConfig(BaseModel):
    """Where problems come from and how they are put to the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generator: str = Field("chain_sum", description="a data set of reasoning-gym, or the path of a .jsonl file")
    settings: dict[str, Any] = Field(default_factory=dict, description="arguments of the generator")
    train: int = Field(2000, ge=1, description="training problems at most")
    held_out: int = Field(200, ge=1, description="held-out problems at most")
    prompt: str = Field("{question}", description="what the model reads; {question} stands for the problem")
    completion: str = Field("{answer}", description="what supervised tuning teaches; {answer} stands for the answer")
    chat: bool = Field(True, description="put the prompt into the tokenizer's chat template")


@dataclass(frozen=True)
class Problem:
    """A question, its answer, and its number in its split."""

    index: int
    question: str
    answer: str


@dataclass(frozen=True)
class Split:
    """Training and held-out problems, and how they were kept apart."""

    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    method: str

    @property
    def overlap(self) -> int:
        """Problems that stand on both sides, up to the order of their numbers."""
        return len({key(p.question) for p in self.train} & {key(p.question) for p in self.held_out})


def key(question: str) -> str:
    """A problem up to the order of its words and numbers, so that 1 + 2 and 2 + 1 count as one."""
    return " ".join(sorted(question.split()))


def make_split(task: TaskConfig, seed: int) -> Split:
    """Distinct problems for both sides, a pure function of (task, seed).

    Raises:
        BadProblems: for an unknown generator, bad settings or rows, or when a side stays empty.
    """
    sides: dict[bool, list[Problem]] = {True: [], False: []}
    wanted = {True: task.held_out, False: task.train}
    seen: set[str] = set()
    for question, answer in _stream(task, seed):
        name = key(question)
        side = xxhash.xxh3_64_intdigest(name.encode()) % HELD_OUT_SHARE == 0
        if name not in seen and len(sides[side]) < wanted[side]:
            seen.add(name)
            sides[side].append(Problem(len(sides[side]), question, answer))
        if all(len(sides[s]) >= wanted[s] for s in sides):
            break
    for side, problems in sides.items():
        if not problems:
            raise BadProblems(
                f"{task.generator} gave no {'held-out' if side else 'training'} problems: widen task.settings"
            )
    method = (
        f"A hash of each problem, blind to the order of its numbers, sends one in {HELD_OUT_SHARE} to the held-out "
        "side and the others to training; duplicates are dropped, so no problem stands on both sides."
    )
    return Split(tuple(sides[False]), tuple(sides[True]), method)


def _stream(task: TaskConfig, seed: int) -> Iterator[tuple[str, str]]:
    if task.generator.endswith(".jsonl"):
        yield from _rows(Path(task.generator))
        return
    per_round = 2 * (task.train + HELD_OUT_SHARE * task.held_out)
    for batch in count():
        if batch == 4:  # a small space of problems may hold fewer than were asked for
            return
        # reasoning-gym draws problem i from seed + i, so rounds and seeds must lie further apart than a round is long
        first = seed * _BETWEEN_SEEDS + batch * per_round
        settings = task.settings | {"seed": first % (1 << 31), "size": per_round}
        try:
            made = reasoning_gym.create_dataset(task.generator, **settings)
        except (TypeError, ValueError, AssertionError) as error:
            raise BadProblems(f"task.generator={task.generator!r} with {task.settings}: {error}") from error
        yield from ((item["question"], item["answer"]) for item in made)


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise BadProblems(f"task.generator={str(path)!r}: there is no such file")
    lines = path.read_text().removesuffix("\n").split("\n")  # splitlines would also split inside of strings
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            question, answer = row["question"], row["answer"]
            if not (isinstance(question, str) and isinstance(answer, str)):
                raise TypeError("both must be strings")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BadProblems(f"{path}:{number}: needs JSON with the fields question and answer ({error!r})") from error
        yield question, answer.rsplit("####", 1)[-1].strip()
