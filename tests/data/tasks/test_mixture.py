"""A mixture gives each task its share of every stretch of prompts, and a task its problems epoch after epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lockstep.data.corpus.blend import BOUND
from lockstep.data.tasks.mixture import MixedTask, Mixture, NamedTask, problem_sets, shuffled, trained_on
from lockstep.data.tasks.task import TaskConfig, make_split


def naive(number: int, size: int, seed: int, phase: str) -> int:
    """The order of one task, as it is for a run without a mixture."""
    order = np.random.default_rng([seed, *phase.encode(), number // size]).permutation(size)
    return int(order[number % size])


@given(st.integers(0, 500), st.integers(1, 40), st.integers(0, 5))
def test_one_task_alone_goes_through_its_problems_as_ever(number: int, size: int, seed: int) -> None:
    assert Mixture([2.5], [size], seed).place(number, "rl") == (0, naive(number, size, seed, "rl"))
    assert shuffled(number, size, seed, "rl") == naive(number, size, seed, "rl")


@given(st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=2, max_size=5), st.integers(0, 3))
def test_tasks_have_their_shares_and_miss_no_problem(weights: list[float], seed: int) -> None:
    sizes = [3 + task for task in range(len(weights))]
    mixture = Mixture(weights, sizes, seed)
    places = [mixture.place(number, "rl") for number in range(300)]
    for task, weight in enumerate(weights):
        mine = [index for each, index in places if each == task]
        for stretch in (10, 100, 300):
            count = sum(each == task for each, _ in places[:stretch])
            assert abs(count - stretch * weight / sum(weights)) <= BOUND
        assert mine == [naive(n, sizes[task], seed, "rl") for n in range(len(mine))]
    assert places == [Mixture(weights, sizes, seed).place(number, "rl") for number in range(300)], (
        "whatever came before"
    )


def test_problem_sets_are_those_of_each_task() -> None:
    tasks = [
        MixedTask(name="sums", weight=2, generator="chain_sum", train=5, held_out=2),
        MixedTask(name="days", generator="calendar_arithmetic", train=4, held_out=1, grader="gym"),
    ]
    sets = problem_sets(tasks, 3)
    assert [(each.name, each.weight, len(each.split.train)) for each in sets] == [("sums", 2, 5), ("days", 1, 4)]
    assert [each.split for each in sets] == [make_split(task, 3) for task in tasks]
    assert sets == trained_on(sets)
    beside = NamedTask(name="products", generator="basic_arithmetic", train=4, held_out=3)
    *same, evaluated = problem_sets(tasks, 3, [beside])
    assert tuple(same) == sets == trained_on([*same, evaluated])
    assert (evaluated.name, evaluated.split.train) == ("products", ())
    assert evaluated.split.held_out == make_split(beside, 3).held_out
    [alone] = problem_sets([TaskConfig(train=3, held_out=2)], 0)
    assert (alone.name, alone.weight) == ("", 1)


@pytest.mark.parametrize("values", [{}, {"name": ""}, {"name": "a b"}, {"name": "a", "weight": 0}, {"name": "a/b"}])
def test_a_task_of_a_mixture_needs_a_name_and_a_weight(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MixedTask.model_validate(values)
