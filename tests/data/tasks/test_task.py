"""Problems: sides that never meet, splits that depend on task and seed only, rows that say where they are bad."""

import json
from pathlib import Path

import pytest
import reasoning_gym

from lockstep.data.row_reader import BadRow
from lockstep.data.tasks.presets import PRESETS
from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.task import BadProblems, Split, TaskConfig, held_out_problems, key, make_split

GSM8K = Path(__file__).parents[4] / "shared" / "datasets" / "gsm8k" / "test.jsonl"
TASKS = [
    TaskConfig(generator="chain_sum", settings={"max_terms": 3, "max_digits": 2}, train=150, held_out=30),
    TaskConfig(generator="gcd", train=80, held_out=20),
]


def rows(tmp_path: Path, *lines: str) -> TaskConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return TaskConfig(generator=str(path))


def numbered(count: int) -> list[str]:
    return [json.dumps({"question": f"What is {i} + 1?", "answer": str(i + 1)}) for i in range(count)]


@pytest.fixture(scope="module", params=TASKS, ids=lambda t: t.generator)
def task(request: pytest.FixtureRequest) -> TaskConfig:
    return request.param


@pytest.fixture(scope="module")
def split(task: TaskConfig) -> Split:
    return make_split(task, 3)


def shuffled_words(problems: tuple[Problem, ...]) -> list[tuple[str, ...]]:
    return [tuple(sorted(p.question.split())) for p in problems]


def test_sides_are_disjoint_up_to_the_order_of_numbers(split: Split) -> None:
    train, held_out = shuffled_words(split.train), shuffled_words(split.held_out)
    assert not set(train) & set(held_out)
    assert split.overlap == 0


def test_no_problem_stands_twice(task: TaskConfig, split: Split) -> None:
    for problems, wanted in ((split.train, task.train), (split.held_out, task.held_out)):
        assert len(set(shuffled_words(problems))) == len(problems) == wanted
        assert [p.index for p in problems] == list(range(wanted))
        assert all(p.question and p.answer for p in problems)


def test_a_split_is_a_function_of_task_and_seed(task: TaskConfig, split: Split) -> None:
    assert make_split(task, 3) == split
    other = make_split(task, 4)
    assert len(set(shuffled_words(other.train)) & set(shuffled_words(split.train))) < len(split.train) / 2
    assert not set(shuffled_words(other.train)) & set(shuffled_words(split.held_out))


def test_an_overlap_would_be_counted() -> None:
    one, turned, other = Problem(0, "1 + 2 =", "3"), Problem(0, "2 + 1 =", "3"), Problem(1, "1 + 3 =", "4")
    assert key(one.question) == key(turned.question)
    assert Split((one, other), (turned,), "").overlap == 1


def test_a_small_space_of_problems_gives_what_it_has() -> None:
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    split = make_split(TaskConfig(generator="chain_sum", settings=settings, train=200, held_out=50), 0)
    assert 0 < len(split.train) < 200
    assert split.overlap == 0


def test_further_rounds_bring_further_problems() -> None:
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    split = make_split(TaskConfig(generator="chain_sum", settings=settings, train=60, held_out=1), 0)
    drawn = reasoning_gym.create_dataset("chain_sum", seed=0, size=2 * (60 + 5), **settings)
    first_round = {key(item["question"]) for item in drawn} - {key(p.question) for p in split.held_out}
    assert len(split.train) == 60
    assert not {key(p.question) for p in split.train} <= first_round


def test_json_lines_keep_their_answers(tmp_path: Path) -> None:
    marked = json.dumps({"question": "How many?", "answer": "It is <<3*4=12>>12.\n#### 12"})
    split = make_split(rows(tmp_path, *numbered(40), marked, marked), 0)
    found = {p.question: p.answer for p in split.train + split.held_out}
    assert len(split.train + split.held_out) == len(found) == 41
    assert found["How many?"] == "12"
    assert all(found[f"What is {i} + 1?"] == str(i + 1) for i in range(40))


def test_a_line_separator_inside_a_string_does_not_end_its_row(tmp_path: Path) -> None:
    odd = json.dumps({"question": "one\u2028two\x85three", "answer": "4"}, ensure_ascii=False)
    split = make_split(rows(tmp_path, *numbered(40), odd), 0)
    assert "one\u2028two\x85three" in {p.question for p in split.train + split.held_out}


def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path) -> None:
    for bad, words in (
        ("not json", "not valid JSON"),
        ('{"question": "q"}', "the field 'answer' is missing"),
        ('{"question": "q", "answer": true}', "the field 'answer' must be text"),
        ("7", "a JSON object is needed"),
    ):
        task = rows(tmp_path, *numbered(2), bad, *numbered(1))
        with pytest.raises(BadRow, match=rf"rows\.jsonl:3: {words}"):
            make_split(task, 0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRow, match=r"nowhere\.jsonl': there is no such file"):
        make_split(TaskConfig(generator=str(tmp_path / "nowhere.jsonl")), 0)


@pytest.mark.parametrize(
    ("generator", "settings"),
    [
        ("no_such_generator", {}),
        ("chain_sum", {"no_such_setting": 1}),
        ("chain_sum", {"min_terms": 0}),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}),
    ],
)
def test_a_bad_generator_is_named_with_its_settings(generator: str, settings: dict[str, int]) -> None:
    with pytest.raises(BadProblems, match=f"task.generator='{generator}' with"):
        make_split(TaskConfig(generator=generator, settings=settings, train=5, held_out=5), 0)


def test_an_empty_side_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadProblems, match=r"gave no (held-out|training) problems: widen task\.settings"):
        make_split(rows(tmp_path, *numbered(1)), 0)


def test_files_for_both_sides_are_taken_as_they_are(tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("\n".join(numbered(9)))
    held_out.write_text("\n".join([*numbered(2), *numbered(2)]))
    task = TaskConfig(generator=str(train), held_out_from=str(held_out), train=5, held_out=3)
    split = make_split(task, 0)
    assert [p.question for p in split.train] == [f"What is {i} + 1?" for i in range(5)]
    assert [p.question for p in split.held_out] == [f"What is {i} + 1?" for i in (0, 1, 0)]
    assert split.overlap == 2
    train.unlink()
    assert held_out_problems(task, 0, []) == split.held_out
    whole = TaskConfig(generator=str(held_out), held_out=1)
    held_out.write_text("\n".join(numbered(40)))
    assert held_out_problems(whole, 0, []) == make_split(whole, 0).held_out


def test_shots_come_from_training_problems_by_seed(tmp_path: Path) -> None:
    task = rows(tmp_path, *numbered(60)).model_copy(update={"shots": 3})
    split = make_split(task, 0)
    assert len(split.shots) == len(set(split.shots)) == 4
    assert set(split.shots) <= set(split.train)
    assert make_split(task, 0).shots == split.shots != make_split(task, 1).shots
    with pytest.raises(BadProblems, match=r"task\.shots=70 solved problems are to be shown, and"):
        make_split(task.model_copy(update={"shots": 70}), 0)


def test_gym_problems_keep_what_their_graders_need() -> None:
    split = make_split(TaskConfig(generator="chain_sum", train=3, held_out=3), 0)
    for problem in split.train:
        assert problem.entry is not None
        score = reasoning_gym.get_score_answer_fn(problem.entry["metadata"]["source_dataset"])
        assert score(problem.answer, problem.entry) == 1.0
        assert score(problem.answer + "1", problem.entry) < 1.0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_tasks_that_a_recipe_can_change(name: str) -> None:
    task = TaskConfig.model_validate({"preset": name, "shots": 1, "generator": "x.jsonl"})
    assert (task.shots, task.generator) == (1, "x.jsonl")
    given = ("shots", "generator")
    assert all(getattr(task, key) == value for key, value in PRESETS[name].values.items() if key not in given)


def test_an_unknown_preset_and_a_prompt_without_a_problem_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task\.preset='gsm9k' is not known: use one of gsm8k, "):
        TaskConfig(preset="gsm9k")
    with pytest.raises(ValueError, match=r"has no place for the problem"):
        TaskConfig(prompt="{problem}")


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K does not lie in ../shared/datasets beside the repository")
def test_gsm8k_has_a_file_for_each_side() -> None:
    task = TaskConfig(preset="gsm8k", generator=str(GSM8K.with_name("train.jsonl")), held_out_from=str(GSM8K))
    split = make_split(task, 0)
    assert (len(split.train), len(split.held_out), split.overlap) == (7473, 1319, 0)
    assert all(p.solution.endswith(f"#### {p.answer}") and "<<" not in p.solution for p in split.train)


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K does not lie in ../shared/datasets beside the repository")
def test_gsm8k_reads_as_numbers() -> None:
    split = make_split(TaskConfig(generator=str(GSM8K), held_out=2000), 0)
    problems = split.train + split.held_out
    lines = [json.loads(line) for line in GSM8K.read_text().split("\n") if line]
    answers = {row["question"]: row["answer"].split("#### ")[1] for row in lines}
    assert {p.question: p.answer for p in problems} == answers
    assert all(p.answer.replace(",", "").lstrip("-").replace(".", "", 1).isdigit() for p in problems)
    assert 0.15 < len(split.held_out) / len(problems) < 0.25


def test_bad_rows_stop_a_task_or_are_counted(tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(40)]
    path = tmp_path / "sums.jsonl"
    path.write_text(
        "\n".join([*map(json.dumps, rows[:20]), "", '{"question"', '{"question": "?"}', *map(json.dumps, rows[20:])])
    )
    task = TaskConfig(generator=str(path), on_bad="skip")
    split = make_split(task, 0)
    assert len(split.train) + len(split.held_out) == 40
    assert [str(error).split(": ")[0] for error in split.skipped] == [f"{path}:22", f"{path}:23"]
    assert f"Bad rows left out: 2; the first: {path}:22: not valid JSON" in split.method
    skipped: list[BadRow] = []
    both = task.model_copy(update={"held_out_from": str(path)})
    assert len(held_out_problems(both, 0, skipped)) == 40
    assert len(skipped) == 2
    assert len(make_split(both, 0).skipped) == 4
    with pytest.raises(BadRow, match=r"sums\.jsonl:22: not valid JSON"):
        make_split(TaskConfig(generator=str(path)), 0)
