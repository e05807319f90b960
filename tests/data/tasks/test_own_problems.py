"""Problems of a function of the user's are split, filtered and refused as those of files."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.data.row_reader import BadRow
from lockstep.data.tasks.task import TaskConfig, make_split
from lockstep.data.tasks.user_function import BadFunction

SOURCE = """
def sums(count, seed=0):
    for n in range(count):
        yield {"question": f"{n} + {seed}", "answer": str(n + seed)}

def even(answer):
    return int(answer) % 2 == 0

def bad(count):
    yield {"question": "1", "answer": "1"}
    yield ["2"]
    yield {"question": "3"}

def broken():
    yield {"question": "1", "answer": "1"}
    raise KeyError("rows")

def picky(question):
    raise ValueError("too long")
"""


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "problems.py").write_text(SOURCE)
    before = list(sys.path)
    yield f"{tmp_path}/problems.py"
    sys.path[:] = before


def task(**values: object) -> TaskConfig:
    return TaskConfig.model_validate({"train": 20, "held_out": 5, **values})


def test_a_generator_gets_settings_and_seed_and_is_split_by_hash(mine: str) -> None:
    config = task(generator=f"{mine}:sums", settings={"count": 100})
    split = make_split(config, 3)
    assert (len(split.train), len(split.held_out), split.overlap) == (20, 5, 0)
    assert split.train[0].question.endswith("+ 3")
    assert make_split(config, 3) == split
    fixed = make_split(task(generator=f"{mine}:sums", settings={"count": 100, "seed": 8}), 3)
    assert fixed.train[0].question.endswith("+ 8")


def test_held_out_problems_may_come_from_another_function(mine: str) -> None:
    split = make_split(task(generator=f"{mine}:sums", held_out_from=f"{mine}:sums", settings={"count": 3}), 1)
    assert [p.answer for p in split.held_out] == [p.answer for p in split.train] == ["1", "2", "3"]


def test_a_filter_keeps_problems_of_both_sides_wherever_they_come_from(mine: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "q{n}", "answer": "{n}"}}\n' for n in range(100)))
    for source, settings in ((f"{mine}:sums", {"count": 100}), (str(rows), {})):
        split = make_split(task(generator=source, settings=settings, filter=f"{mine}:even"), 0)
        answers = [int(p.answer) for p in (*split.train, *split.held_out)]
        assert len(answers) == 25
        assert not [answer for answer in answers if answer % 2]


def test_bad_rows_name_function_and_row_or_are_counted(mine: str) -> None:
    config = {"generator": f"{mine}:bad", "held_out_from": f"{mine}:bad", "settings": {"count": 3}}
    with pytest.raises(BadRow, match=r"problems.py:bad, row 2: a dictionary is needed, and this is list"):
        make_split(task(**config), 0)
    split = make_split(task(**config, on_bad="skip"), 0)
    assert (len(split.train), len(split.skipped)) == (1, 4)
    assert "problems.py:bad, row 3: the field 'answer' is missing" in str(split.skipped[1])


def test_functions_that_fail_are_named_with_what_they_were_given(mine: str) -> None:
    with pytest.raises(BadFunction, match=r"problems.py:broken failed with \{\} \(KeyError: 'rows'\)"):
        make_split(task(generator=f"{mine}:broken"), 0)
    with pytest.raises(BadFunction, match=r"problems.py:sums failed with \{'n': 1\} \(TypeError: "):
        make_split(task(generator=f"{mine}:sums", settings={"n": 1}), 0)
    with pytest.raises(BadFunction, match=r"problems.py:picky failed on '0 \+ 0' \(ValueError: too long\)"):
        make_split(task(generator=f"{mine}:sums", settings={"count": 9}, filter=f"{mine}:picky"), 0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"grader": "gym", "generator": "m:f"}, "these problems come from a function"),
        ({"grader": "gyms"}, "task.grader='gyms' is not known: use answer, gym, llm_judge, module:function or"),
        ({"filter": "even"}, "task.filter='even' names no function"),
    ],
)
def test_settings_that_fit_nothing_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task(**values)
