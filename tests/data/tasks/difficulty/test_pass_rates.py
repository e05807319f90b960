"""Problems are trained on where their measured pass rate lies within bounds, in whatever order they were measured."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from lockstep.data.row_reader import BadRow
from lockstep.data.tasks.code_tests import Case, CodeTests
from lockstep.data.tasks.difficulty.pass_rates import filter_by_pass_rate, read_pass_rates
from lockstep.data.tasks.mixture import problem_sets
from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.task import BadProblems, TaskConfig, make_split


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def counts(problem: Problem, correct: int, incorrect: int) -> dict[str, object]:
    sampled = {"correct": correct, "incorrect": incorrect, "ungradable": 8 - correct - incorrect}
    return {"problem": 7, "digest": problem.digest, "sampled": sampled}


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write(tmp_path / "data.jsonl", [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)])


def test_problems_within_bounds_are_kept_and_held_out_ones_untouched(data: str, tmp_path: Path) -> None:
    task = TaskConfig(generator=data, shots=2)
    whole = make_split(task, 0)
    rates = {problem.digest: index % 9 for index, problem in enumerate(whole.train)}
    rows = [counts(problem, index % 9, 8 - index % 9) for index, problem in enumerate(whole.train)]
    random.Random(0).shuffle(rows)
    measured = write(tmp_path / "rates.jsonl", rows)
    [found] = problem_sets([task.model_copy(update={"pass_rates": measured, "pass_rate": [0.125, 0.75]})], 0)
    kept = [problem for problem in whole.train if 1 <= rates[problem.digest] <= 6]
    assert [problem.question for problem in found.split.train] == [problem.question for problem in kept]
    assert [problem.index for problem in found.split.train] == list(range(len(kept)))
    assert [problem.pass_rate for problem in found.split.train] == [rates[problem.digest] / 8 for problem in kept]
    assert (found.split.held_out, found.split.shots) == (whole.held_out, whole.shots)
    assert found.split.filtered == (
        f"Of {len(rows)} training problems {len(rows) - len(kept)} were left out, whose measured pass rates are not "
        "within 0.125 to 0.75."
    )
    assert whole.filtered == ""


def test_a_problem_that_was_not_measured_is_refused(data: str, tmp_path: Path) -> None:
    task = TaskConfig(generator=data)
    split = make_split(task, 0)
    rows = [counts(problem, 1, 7) for problem in split.train]
    some = task.model_copy(update={"pass_rates": write(tmp_path / "some.jsonl", rows[:-1])})
    with pytest.raises(BadProblems, match=r"1 of \d+ training problems have no pass rate in .* lower task\.train"):
        filter_by_pass_rate(split, some)
    hard = {"pass_rates": write(tmp_path / "all.jsonl", rows), "pass_rate": [0.5, 1.0]}
    with pytest.raises(BadProblems, match=r"leaves none of \d+ .* whose pass rates are 0\.125 to 0\.125: widen it"):
        filter_by_pass_rate(split, task.model_copy(update=hard))
    ungraded = write(tmp_path / "none.jsonl", [counts(problem, 0, 0) for problem in split.train])
    with pytest.raises(BadProblems, match="since no completion could be graded"):
        filter_by_pass_rate(split, task.model_copy(update={"pass_rates": ungraded}))


def test_data_sets_that_have_a_pass_rate_of_their_own_are_their_own_measurement(tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1), "solve_rate": i / 40} for i in range(40)]
    data = write(tmp_path / "data.jsonl", list(rows))
    fields = {"pass_rate": "solve_rate"}
    task = TaskConfig(generator=data, pass_rates=data, pass_rate=[0.25, 0.5], fields=fields)
    [found] = problem_sets([task], 0)
    assert found.split.train
    assert all(problem.pass_rate == (int(problem.answer) - 1) / 40 for problem in found.split.train)
    assert {int(problem.answer) - 1 for problem in found.split.train} <= set(range(10, 21))


def test_problems_that_come_twice_have_the_rate_of_all_their_samples(tmp_path: Path) -> None:
    problem = Problem(0, "1 + 1?", "2")
    rows = [counts(problem, 1, 7), counts(problem, 3, 1), counts(Problem(0, "?", ""), 0, 0)]
    rates = read_pass_rates(write(tmp_path / "rates.jsonl", rows), {})
    assert rates.pop(problem.digest) == 4 / 12
    assert [rate != rate for rate in rates.values()] == [True]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"digest": "00", "greedy": {"correct": 1, "incorrect": 0}}, "measure pass rates with lockstep eval --samples"),
        ({"digest": "00", "sampled": {"correct": -1, "incorrect": 0}}, "'correct' must be a number from 0 on"),
        ({"digest": "00", "sampled": {"correct": 1}}, "'incorrect' is missing"),
        ({"question": "?", "answer": "1"}, "'pass_rate' is missing"),
        ({"question": "?", "answer": "1", "pass_rate": 1.5}, "'pass_rate' must be a share from 0 to 1"),
        ({"question": "?", "answer": "1", "pass_rate": "half"}, "'pass_rate' must be a number"),
    ],
)
def test_bad_rows_are_named(row: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises((BadRow, BadProblems), match=words) as error:
        read_pass_rates(write(tmp_path / "rates.jsonl", [row]), {})
    assert "rates.jsonl:1" in str(error.value)


def test_an_evaluation_that_has_not_ended_is_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(BadProblems, match="has not ended"):
        read_pass_rates(str(tmp_path), {})


def test_digests_differ_where_anything_asked_or_right_does() -> None:
    plain = Problem(0, "a", "b", system="c")
    different = [
        plain,
        Problem(0, "ab", "", system="c"),
        Problem(0, "a", "bc"),
        replace(plain, tests=CodeTests("d", "e")),
        replace(plain, tests=CodeTests("d", "", "e")),
        replace(plain, tests=CodeTests(cases=(Case("d", "e"),))),
        replace(plain, tests=CodeTests(cases=(Case("d", "e"), Case("", "")))),
    ]
    assert len({problem.digest for problem in different}) == len(different)
    for problem in different:
        assert replace(problem, index=3, solution="x", examples="y", pass_rate=0.5).digest == problem.digest


@pytest.mark.parametrize("values", [{"pass_rate": [0.1, 0.9]}, {"pass_rates": "x", "pass_rate": [0.9, 0.1]}])
def test_bounds_need_a_measurement_and_an_order(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="pass_rate"):
        TaskConfig.model_validate(values)
