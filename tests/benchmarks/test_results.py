"""The tool behind docs/results.md: its page is what its rows say, and a row has the same weights again."""

import json
import math
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import results
from hypothesis import given
from hypothesis import strategies as st

from lockstep.cluster.recipe.load import load_recipe
from lockstep.rl.cores import usable_cores
from result_table.intervals import interval, student_share, student_t
from result_table.machine import CORES, Machine, few_cores, this_machine
from result_table.measured import weights_digest
from result_table.methods import METHODS, RECIPE, ROOT, SEEDS, TASKS, settings_of
from result_table.page import EMPTY, PAGE, page_with, tables
from result_table.rows import ROWS, Counts, Row, append_row, read_rows
from tests.cluster.cli_process import summary, until, write_recipe

HERE = Machine(processor="Zen", instructions=("avx2", "fma"), cores=2)


def row(seed: int = 0, correct: int = 60, **given: object) -> Row:
    """A row of 100 problems."""
    values: dict[str, object] = {
        "task": "sums",
        "method": "grpo",
        "seed": seed,
        "commit": "c" * 40,
        "machine": HERE,
        "correct": correct,
        "problems": 100,
        "accuracy": correct / 100,
        "before": Counts(correct=10, problems=100),
        "supervised": Counts(correct=40, problems=100),
        "seconds": 300.0 + seed,
        "digest": f"{seed:032x}",
        "versions": {"torch": "2.13.0"},
        "date": "2026-12-01",
    }
    return Row.model_validate(values | given)


def cells(text: str, name: str) -> list[list[str]]:
    """The cells of the table lines that begin so."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {name} |")]


def test_the_page_is_what_its_rows_say() -> None:
    text = PAGE.read_text()
    assert page_with(text, read_rows(ROWS)) == text


def test_the_page_names_every_task_and_method() -> None:
    assert all(f"| `{task}` |" in PAGE.read_text() for task in TASKS)
    assert all(re.search(rf"^\| .*`{method}`.* \|", PAGE.read_text(), re.MULTILINE) for method in METHODS)


@pytest.mark.parametrize("task", TASKS)
def test_methods_have_one_start_and_as_many_problems_and_completions(task: str) -> None:
    recipes = {method: load_recipe(RECIPE, settings_of(task, method, 3)) for method in METHODS}
    quickstart = load_recipe("quickstart")
    for method, recipe in recipes.items():
        shown = recipe.model_dump(include={"model", "layout", "trainer", "rollout", "evaluation"})
        assert shown == quickstart.model_dump(include=set(shown))
        assert recipe.seed == 3
        assert (recipe.task == quickstart.task) is (task == "sums")
        assert recipe.supervised is not None
        assert recipe.rl is not None
        supervised = 0 if method == "sft" else recipe.supervised.steps
        assert recipe.supervised.model_copy(update={"steps": 16}) == quickstart.supervised
        assert supervised in (0, 16)
        pairs = recipe.preference.prompts if recipe.preference else 0
        prompts = pairs + recipe.rl.steps * recipe.rl.prompts_per_step
        answers = (recipe.supervised.steps - 16) * recipe.supervised.problems_per_step
        assert prompts + answers == 1152
        assert (recipe.preference.completions if recipe.preference else recipe.rl.group_size) == 8
    kinds = [str(recipe.model_dump(exclude={"run", "name"})) for recipe in recipes.values()]
    assert len(set(kinds)) == len(METHODS)


@given(st.integers(1, 40), st.floats(0.01, 20))
def test_students_share_is_that_of_its_density(freedom: int, t: float) -> None:
    at, width = np.linspace(0, t, 4001, retstep=True)
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(log) * (1 + at * at / freedom) ** (-(freedom + 1) / 2)
    simpson = width / 3 * (density[0] + 4 * density[1::2].sum() + 2 * density[2:-1:2].sum() + density[-1])
    assert student_share(t, freedom) == pytest.approx(2 * simpson, abs=1e-6)


def test_intervals_are_students_over_seeds_and_wilsons_of_one() -> None:
    assert [round(student_t(n), 3) for n in (1, 2, 4, 30)] == [12.706, 4.303, 2.776, 2.042]
    shares = [0.50, 0.55, 0.61, 0.58, 0.46]
    mean, low, high = interval([Counts(correct=round(100 * s), problems=100) for s in shares])
    half = 2.776445 * statistics.stdev(shares) / math.sqrt(5)
    assert (mean, low, high) == pytest.approx((0.54, 0.54 - half, 0.54 + half), abs=1e-7)
    alone = interval([Counts(correct=60, problems=110, ungradable=10)])
    assert alone == pytest.approx((0.6, 0.502003, 0.690599), abs=1e-5)
    assert interval([Counts(correct=n, problems=100) for n in (99, 100)])[2] == 1


def test_a_table_has_the_start_each_method_and_how_many_seeds_it_is_of() -> None:
    rows = [row(seed, 60 + seed) for seed in SEEDS]
    rows += [row(seed, 50, method="sft", supervised=None) for seed in (2, 0)]
    rows += [row(method="grpo-asynchronous", before=Counts(correct=11, problems=100))]
    text = tables(rows)
    assert cells(text, "base model") == [["base model", "5", "10.0%", "10.0% to 10.0%", ", ".join(5 * ["10/100"]), "–"]]
    assert cells(text, "supervised steps of all")[0][1:3] == ["5", "40.0%"]
    accuracy, digests = cells(text, "grpo")
    by_seed = "60/100, 61/100, 62/100, 63/100, 64/100"
    assert accuracy == ["grpo", "5", "62.0%", "60.0% to 64.0%", by_seed, "302"]
    assert digests == ["grpo", *(f"`{seed:012x}`" for seed in 5 * [0])]
    few, some = cells(text, "sft")
    assert few[1:3] == ["2 of 5", "50.0%"]
    assert some[1:] == ["`000000000000`", "–", "`000000000000`", "–", "–"]
    one, none = cells(text, "grpo-asynchronous")
    assert one[1:4] == ["1 of 5", "60.0%", "50.2% to 69.1%, Wilson"]
    assert none[1:] == ["not reproducible", "–", "–", "–", "–"]
    assert text.index("| sft") < text.index("| grpo") < text.index("| grpo-asynchronous")


def test_no_mean_is_over_machines_commits_or_tasks() -> None:
    other = HERE.model_copy(update={"cores": 1})
    places = ({}, {"machine": other}, {"commit": "d" * 40 + "+12"}, {"task": "legs"})
    text = tables([row(correct=10 * n, **place) for n, place in enumerate(places)])
    assert [each[2] for each in cells(text, "grpo")[::2]] == ["0.0%", "30.0%", "10.0%", "20.0%"]
    assert text.count("### Zen (avx2, fma), 2 cores") == 2
    assert text.count("### Zen (avx2, fma), 1 core\n") == 1
    assert "at commit dddddddddddd with changes that are not committed" in text
    assert tables([]) == EMPTY


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [row(seed, versions={"torch": "2.13.0", "compiler": 'gcc "12"'}) for seed in range(3)]
    for each in rows:
        append_row(file, each)
    assert read_rows(file) == rows
    assert [json.loads(line)["accuracy"] for line in file.read_text().splitlines()] == [0.6] * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:40], r"line 2 is no row \(the line: Invalid JSON"),
        (lambda text: text.replace('"correct":61', '"correct":62'), r"accuracy 0\.61 is not 62 of 100"),
        (lambda text: text.replace('"digest":"', '"digest":"x'), r"line 2 is no row \(digest: "),
        (lambda text: text.replace('"date"', '"day"'), r"line 2 is no row \(date: Field required\)"),
        (lambda text: text.replace('"problems":100', '"problems":0', 1), r"line 2 is no row \(problems: "),
        (lambda text: row(0).model_dump_json(), r"line 2 is of sums-grpo-0 again"),
    ],
)
def test_a_line_that_is_no_row_is_named_and_nothing_is_added(
    change: Callable[[str], str], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{row(0).model_dump_json()}\n{change(row(1, 61).model_dump_json())}\n")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=said) as error:
        append_row(file, row(2))
    assert "\n" not in str(error.value)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("row", "--task", "sums", "--method", "grop", "--seed", "0"), r"no method 'grop': give one of sft, rsft, dpo"),
        (("row", "--task", "sum", "--method", "grpo", "--seed", "0"), "no task 'sum': give one of sums, "),
        (("row", "--task", "sums", "--method", "grpo", "--seed", "-1"), "seed -1 is below 0"),
        (("rows", "--method", "grpo", "ddpo", "--seeds", "0"), "no method 'ddpo'"),
        (("row", "--task", "sums", "--method", "grpo-asynchronous", "--seed", "0", "--again"), "leave out --again"),
        (("row", "--task", "sums", "--method", "grpo", "--seed", "0", "--again"), "no row sums-grpo-0 of commit "),
        (("digest", "nowhere"), "nowhere holds no checkpoint"),
        (("table", "--page", "README.md"), "lacks one of the lines"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(
    command: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = () if command[0] == "digest" else ("--rows", str(tmp_path / "rows.jsonl"))
    words = [str(ROOT / word) if word == "README.md" else word for word in command]
    assert results.main([*words, *rows]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{said}.*\n", printed.err)
    assert not printed.out
    assert not list(tmp_path.iterdir())


def test_rows_of_another_recipe_stay_out_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["row", "--task", "sums", "--method", "grpo", "--seed", "0", "--recipe", str(tmp_path / "other.toml")]
    assert results.main(words) == 2
    assert "give --rows another file, too" in capsys.readouterr().err


def test_rows_that_are_there_are_not_run_again_and_one_that_fails_is_no_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, recipe = tmp_path / "rows.jsonl", tmp_path / "none.toml"
    with few_cores():
        there = row(method="rloo", machine=this_machine(), commit=results.commit())
    append_row(file, there)
    words = ["--seeds", "0", "--recipe", str(recipe), "--rows", str(file), "--runs", str(tmp_path / "runs")]
    assert results.main(["rows", "--task", "sums", "--method", "grpo", "rloo", *words]) == 1
    said = capfd.readouterr()
    result = f"60.0% (60 of 100 correct, 10 of 100 before), 300 s, weights {there.digest}"
    assert said.out == f"sums-rloo-0: {result}, as it is in {file}; --again runs it once more and compares\n"
    assert "error: sums-grpo-0 ended with exit code 2: no row was appended\n" in said.err
    assert said.err.endswith("failed: sums-grpo-0; the same command tries these again\n")
    assert read_rows(file) == [there]


def test_a_machine_is_known_by_its_processor_its_instructions_and_the_cores_of_a_run(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9R14\ncpu family\t: 25\n"
        "flags\t\t: fpu fma avx2 avx512f avx512_bf16\n\nprocessor\t: 1\nmodel name\t: other\n"
    )
    whole = usable_cores()
    with few_cores(1):
        alone = this_machine(info)
    assert alone.processor == "AMD EPYC 9R14 family 25 model 17"
    assert alone.instructions == ("avx2", "fma", "avx512f", "avx512_bf16")
    assert alone.cores == 1
    assert this_machine(info).cores == whole
    with few_cores():
        assert this_machine(tmp_path / "none").cores == min(CORES, whole)


TOOL = (sys.executable, str(ROOT / "benchmarks" / "results.py"))
"""The script as a user starts it."""


def row_of(folder: Path, model: Path, method: str) -> tuple[str, ...]:
    """The words of a row of the tests' recipe, which goes to rows.jsonl and runs in a folder."""
    places = {"--recipe": write_recipe(folder, model), "--rows": folder / "rows.jsonl", "--runs": folder / "runs"}
    given = (word for name, place in places.items() for word in (name, str(place)))
    return ("row", "--task", "sums", "--method", method, "--seed", "0", *given)


def tool(log: Path, *words: str) -> tuple[int, str]:
    """The script's exit code and what it printed."""
    with log.open("wb") as output:
        code = subprocess.run([*TOOL, *words], stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    return code, log.read_text(errors="replace")


@pytest.mark.exhaustive
def test_a_row_is_what_its_run_says_and_other_weights_are_told(tmp_path: Path, tiny_folder: Path) -> None:
    file, runs, words = tmp_path / "rows.jsonl", tmp_path / "runs", row_of(tmp_path, tiny_folder, "grpo")
    code, output = tool(tmp_path / "first", *words, "--keep")
    assert code == 0, output
    (made,) = read_rows(file)
    said = summary(runs / made.name)
    stages = {each["stage"]: (each["correct"], each["total"]) for each in said["rows"]}  # type: ignore[attr-defined]
    assert stages == {
        "before": (made.before.correct, made.before.problems),
        "supervised": (made.supervised and made.supervised.correct, 4),
        "after": (made.correct, made.problems),
    }
    assert made.seconds == said["seconds"]
    assert made.versions["torch"] == said["software"]["torch"]  # type: ignore[index]
    assert weights_digest(runs / made.name) == made.digest != weights_digest(runs / made.name / "model")

    other = made.model_copy(update={"digest": "0" * 32, "versions": made.versions | {"torch": "2.11.0"}})
    file.write_text(other.model_dump_json() + "\n")
    code, output = tool(tmp_path / "second", *words, "--again")
    versions = f"torch was 2.11.0 and is {made.versions['torch']}"
    line = f"different: {made.name} ended with {made.digest}, and on {made.date} with {'0' * 32}; {versions}"
    assert (code, output.splitlines()[-1]) == (1, line)
    assert not (runs / made.name / "checkpoints").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_row_and_ends_with_the_same_weights_again(
    method: str, tmp_path: Path, tiny_folder: Path
) -> None:
    file, words = tmp_path / "rows.jsonl", row_of(tmp_path, tiny_folder, method)
    code, output = tool(tmp_path / "first", *words)
    assert code == 0, output
    (made,) = read_rows(file)
    assert (made.supervised is None) is (method == "sft")
    code, output = tool(tmp_path / "second", *words, "--again")
    if method == "grpo-asynchronous":
        assert code == 2
    else:
        assert (code, output.splitlines()[-1]) == (0, f"same: {made.name} ended with {made.digest} again")
    assert read_rows(file) == [made]


@pytest.mark.exhaustive
def test_an_interrupted_row_leaves_no_line_and_no_process(tmp_path: Path, tiny_folder: Path) -> None:
    file, log = tmp_path / "rows.jsonl", tmp_path / "log"
    command = [*TOOL, *row_of(tmp_path, tiny_folder, "rloo")]
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    until(lambda: b"measuring held-out accuracy" in log.read_bytes() or child.poll() is not None, 120)
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == 130, log.read_text()
    assert log.read_text().endswith("error: interrupted: the row that was being made was not appended\n")
    assert not file.exists()
    assert summary(tmp_path / "runs" / "sums-rloo-0")["status"] == "interrupted"
