"""A curriculum's prompts come as often as its function weighs them, and follow from seed and number alone."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lockstep.data.tasks.difficulty.curriculum import Curriculum, ProblemWeights, check_curriculum
from lockstep.data.tasks.mixture import ProblemSet, curriculum_of
from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.task import Split, TaskConfig
from lockstep.data.tasks.user_function import BadFunction

SOURCE = """
import random

def by_rate(pass_rate, step, steps):
    return 1.0 if pass_rate >= 1 - step / steps else 0.0

def later(task, step, steps):
    assert task == "second"
    return step / steps

def negative(step):
    return 1.5 - step

def nothing(step):
    return 2 - step

def luck():
    return random.random()

def weight(answer):
    return float(answer)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "curricula.py").write_text(SOURCE)
    before = list(sys.path)
    yield f"{tmp_path}/curricula.py"
    sys.path[:] = before


def problems(count: int) -> tuple[Problem, ...]:
    return tuple(Problem(i, f"question {i}", str(i), pass_rate=i / (count - 1)) for i in range(count))


def task(function: str = "", count: int = 11, name: str = "", weight: float = 1.0) -> ProblemSet:
    return ProblemSet(TaskConfig(curriculum=function), Split(problems(count), (), ""), name, weight)


def made(*tasks: ProblemSet, seed: int = 0, prompts: int = 6, steps: int = 5) -> Curriculum:
    curriculum = curriculum_of(tasks, seed, "rl", prompts, steps)
    assert curriculum
    return curriculum


def test_a_function_of_the_pass_rate_lets_problems_in_as_training_goes_on(mine: str) -> None:
    curriculum = made(task(f"{mine}:by_rate"))
    for step in range(5):
        drawn = [curriculum.place(number) for number in range(6 * step, 6 * step + 6)]
        allowed = {i for i in range(11) if i / 10 >= 1 - (step + 1) / 5}
        assert {index for _, index in drawn} <= allowed
        counts = Counter(index for _, index in drawn)
        assert max(counts.values()) <= ceil(6 / len(allowed)), "none comes more often than its share, rounded up"
    behind = {curriculum.place(number)[1] for number in range(30, 300)}
    assert behind == set(range(11)), "steps behind the last have its weights"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 5), min_size=1, max_size=6), min_size=1, max_size=3).filter(
        lambda all_: sum(map(sum, all_)) > 1e-3
    ),
    st.integers(1, 20),
    st.integers(0, 9),
)
def test_each_problem_and_task_has_its_share_of_every_step(weights: list[list[float]], prompts: int, seed: int) -> None:
    """The naive version: the expected number of each, from the definition."""
    shares = [3.0, 1.0, 2.0][: len(weights)]
    weighed = [Given(each) for each in weights]
    curriculum = Curriculum(shares, weighed, seed, "rl", prompts)
    exact = [[share * w / len(each) for w in each] for share, each in zip(shares, weights, strict=True)]
    whole = sum(map(sum, exact))
    for step in range(3):
        places = [curriculum.place(number) for number in range(step * prompts, (step + 1) * prompts)]
        for number, each in enumerate(exact):
            for index, weight in enumerate(each):
                within(places.count((number, index)), prompts * weight / whole)
            within(sum(found == number for found, _ in places), prompts * sum(each) / whole)


class Given(ProblemWeights):
    """Weights that a test gives."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__("", problems(len(weights) + 1)[1:], "", 1)
        self.weights = np.array(weights)

    def __call__(self, step: int) -> np.ndarray:
        return self.weights


def within(count: int, exact: float) -> None:
    assert floor(exact - 1e-6) <= count <= ceil(exact + 1e-6)


def test_order_follows_from_seed_and_number_alone(mine: str) -> None:
    tasks = [task(f"{mine}:by_rate"), task(f"{mine}:later", 4, "second", 2.0)]
    whole = [made(*tasks).place(number) for number in range(60)]
    assert [made(*tasks).place(number) for number in reversed(range(60))] == whole[::-1], "whatever came before"
    assert [made(*tasks, seed=1).place(number) for number in range(60)] != whole
    first, last = (sum(found for found, _ in whole[start : start + 6]) for start in (0, 24))
    within(first, 6 * 2 * 0.2 / (2 * 0.2 + 3 / 11))
    assert last == 4, "a task's share is its weight times the mean weight of its problems"


def test_tasks_without_a_curriculum_keep_their_weight(mine: str) -> None:
    curriculum = made(task(), task(f"{mine}:later", 7, "second"))
    shares = [[some.sum() for some in curriculum.shares(step)] for step in (1, 5)]
    np.testing.assert_allclose(shares, [[1 / 1.2, 0.2 / 1.2], [0.5, 0.5]])
    assert curriculum_of([task(), task("", 3)], 0, "rl", 6, 5) is None


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("negative", "negative returned -3.5 on 'question 0' in step 5, and a weight is a finite number from 0 on"),
        ("nothing", r"nothing returned -3\.0"),
        ("luck", "has other weights each time for step 1"),
        ("weight", r"failed on 'word' in step 1 \(ValueError: could not convert"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_a_function_that_cannot_weigh_is_named_before_the_run(mine: str, function: str, words: str) -> None:
    found = task(f"{mine}:{function}")
    if function == "weight":
        word = replace(found.split.train[0], question="word", answer="much")
        found = replace(found, split=Split((word,), (), ""))
    with pytest.raises(BadFunction, match=words):
        check_curriculum(made(found), 5)


def test_a_step_in_which_nothing_weighs_is_refused(mine: str) -> None:
    with pytest.raises(BadFunction, match="every problem the weight 0 in step 2"):
        check_curriculum(made(task(f"{mine}:nothing"), steps=2), 2)


def test_a_curriculum_is_the_name_of_a_function() -> None:
    with pytest.raises(ValidationError, match=r"task\.curriculum='easy first' names no function"):
        TaskConfig(curriculum="easy first")
