"""`lockstep eval`: every completion is kept, a killed evaluation goes on, and nothing is mixed with other settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.cluster.evaluation.accuracy import pass_at_k
from lockstep.cluster.recipe.load import load_recipe
from lockstep.data.preferences import from_verdicts
from lockstep.data.tasks.difficulty.pass_rates import read_pass_rates
from lockstep.data.tasks.mixture import problem_sets
from lockstep.data.tasks.task import make_split
from tests.cluster.cli_process import Command, lockstep, refused
from tests.rl.verifiers.llm_judge.scripted_endpoint import says, scripted

SHORT = ["--dtype", "float32", "--max-new-tokens", "40", "--samples", "12", "--temperature", "2"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "sums.jsonl"
    rows = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(3) for b in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "eval"
    result = lockstep("eval", str(tiny_folder), *task(problems), "--output", str(folder), "--k", "1", "--k", "4")
    assert result.exit_code == 0, result.output
    assert "of 9 correct" in result.stdout
    assert "95% interval" in result.stdout
    assert "pass@4: " in result.stdout
    return folder


def task(problems: Path) -> list[str]:
    return ["--file", str(problems), *SHORT, "--set", "task.chat=false"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_completion_is_kept_with_its_verdict(whole: Path) -> None:
    rows = lines(whole / "completions.jsonl")
    greedy, sampled = ([row for row in rows if row["mode"] == mode] for mode in ("greedy", "sampled"))
    assert [(row["problem"], row["sample"]) for row in greedy] == [(i, 0) for i in range(9)]
    assert [(row["problem"], row["sample"]) for row in sampled] == [(i, s) for i in range(9) for s in range(12)]
    assert all(row["outcome"] in ("correct", "incorrect", "ungradable") and row["prompt"] for row in rows)
    assert len({row["completion"] for row in sampled if row["problem"] == 0}) > 6


def test_the_summary_is_what_the_completions_say(whole: Path) -> None:
    rows = [row for row in lines(whole / "completions.jsonl") if row["mode"] == "sampled"]
    summary, counts = json.loads((whole / "summary.json").read_text()), lines(whole / "problems.jsonl")
    values = []
    for problem in range(9):
        outcomes = [row["outcome"] for row in rows if row["problem"] == problem]
        assert {kind: outcomes.count(kind) for kind in counts[problem]["sampled"]} == counts[problem]["sampled"]
        correct, wrong = outcomes.count("correct"), outcomes.count("incorrect")
        values.append(pass_at_k(correct + wrong, correct, 4))
    assert summary["pass_at"]["4"]["value"] == pytest.approx(sum(values) / 9)
    assert (summary["problems"], summary["samples"], summary["overlap"]) == (9, 12, None)


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_completions(
    whole: Path, tiny_folder: Path, problems: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "eval"
    arguments = ["eval", str(tiny_folder), *task(problems), "--output", str(folder)]
    command = Command(tmp_path / "log", *arguments)
    command.wait_for_file(folder / "completions.jsonl")
    command.kill()
    kept = (folder / "completions.jsonl").read_text()
    assert 0 < kept.count("\n") < 9 * 13
    with (folder / "completions.jsonl").open("a") as file:
        file.write('{"mode": "greedy", "prob')
    assert not (folder / "summary.json").exists()
    result = lockstep(*arguments)
    assert result.exit_code == 0, result.output
    assert sorted(kept.splitlines())[0] in (folder / "completions.jsonl").read_text().splitlines()
    assert (folder / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()


def test_what_is_complete_is_not_answered_again(whole: Path, tiny_folder: Path, problems: Path) -> None:
    file = whole / "completions.jsonl"
    before = file.read_bytes()
    marked = before.replace(b'"finish_reason": "', b'"finish_reason": "kept ')
    assert marked != before
    file.write_bytes(marked)
    result = lockstep("eval", str(tiny_folder), *task(problems), "--output", str(whole), "--k", "4")
    after = file.read_bytes()
    file.write_bytes(before)
    assert result.exit_code == 0, result.output
    assert after == marked


def test_other_settings_are_refused(whole: Path, tiny_folder: Path, problems: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(tiny_folder), *task(problems), "--output", str(whole)]
    assert "was begun with sampling.temperature=2.0, and now it is 0.5" in refused(*arguments, "--temperature", "0.5")
    assert "was begun with --samples 12, and now it is 13" in refused(*arguments, "--samples", "13")
    assert "task.instruction=''" in refused(*arguments, "--set", "task.instruction=Think.")
    assert "pass@13 needs 13 samples or more, and these are 12" in refused(*arguments, "--k", "13")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert "holds no evaluation: give another folder with --output" in refused(*arguments[:-1], str(tmp_path / "mine"))
    assert "there is no such file" in refused(*arguments, "--file", "nowhere.jsonl")
    assert "--task 'gsm9k' is not known: give gsm8k, " in refused(*arguments, "--task", "gsm9k")
    assert "give --task or --file" in refused("eval", str(tiny_folder))


def test_training_problems_are_measured_for_a_mixtures_filter_by_pass_rate(
    tiny_folder: Path, problems: Path, tmp_path: Path
) -> None:
    recipe, folder = tmp_path / "mixed.toml", tmp_path / "rates"
    text = f"""
[evaluation]
max_new_tokens = 8
[[tasks]]
name = "sums"
generator = "{problems}"
held_out_from = "{problems}"
chat = false
[[tasks]]
name = "others"
"""
    recipe.write_text(text)
    short = ["--name", "sums", "--dtype", "float32", "--output", str(folder)]
    command = ["eval", str(tiny_folder), "--task", str(recipe), "--train", *short]
    assert "give --samples 8, for example" in refused(*command)
    result = lockstep(*command, "--samples", "4", "--temperature", "2")
    assert result.exit_code == 0, result.output
    mixed = load_recipe(recipe)
    train = make_split(mixed.tasks[0], mixed.seed).train
    counts = lines(folder / "problems.jsonl")
    assert [row["digest"] for row in counts] == [problem.digest for problem in train]
    rates = read_pass_rates(str(folder), {})
    assert rates == {row["digest"]: row["sampled"]["correct"] / 4 for row in counts}
    recipe.write_text(text.replace("chat =", f'pass_rates = "{folder}"\nchat ='))
    again = lockstep(*command, "--samples", "4", "--temperature", "2")
    assert again.exit_code == 0, "a recipe that uses the measurement measures the same problems"
    found = problem_sets(load_recipe(recipe).tasks[:1], 0)[0].split
    assert [problem.pass_rate for problem in found.train] == [rates[problem.digest] for problem in train]


def test_completions_become_preference_pairs(whole: Path) -> None:
    rows = lines(whole / "completions.jsonl")
    both = {row["prompt"] for row in rows if row["outcome"] == "correct"}
    pairs = list(from_verdicts(rows))
    assert {pair.prompt for pair in pairs} <= both
    right = {(row["prompt"], row["completion"]) for row in rows if row["outcome"] == "correct"}
    assert all((p.prompt, p.ranked[0]) in right and (p.prompt, p.ranked[1]) not in right for p in pairs)


def test_shots_and_instructions_stand_in_the_prompt(tiny_folder: Path, problems: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(tiny_folder), "--task", str(problems), "--file", str(problems), "--limit", "2"]
    settings = ["--set", "task.shots=2", "--set", "task.instruction=Add.", "--set", "task.system=You can add."]
    short = ["--dtype", "float32", "--max-new-tokens", "2", "--output", str(tmp_path / "eval")]
    result = lockstep(*arguments, *settings, *short)
    assert result.exit_code == 0, result.output
    assert "2 stand among the training problems" in result.stdout
    for row in lines(tmp_path / "eval" / "completions.jsonl"):
        assert row["prompt"].count("Add.") == 3
        assert row["prompt"].count("<|im_start|>assistant") == 3
        assert row["prompt"].startswith("<|im_start|>system\nYou can add.<|im_end|>")


def test_gym_tasks_are_scored_with_partial_credit(tiny_folder: Path, tmp_path: Path) -> None:
    short = ["--limit", "3", "--dtype", "float32", "--max-new-tokens", "4", "--output", str(tmp_path / "eval")]
    result = lockstep("eval", str(tiny_folder), "--task", "chain_sum", "--set", "task.grader=gym", *short)
    assert result.exit_code == 0, result.output
    rows = lines(tmp_path / "eval" / "completions.jsonl")
    assert [row["outcome"] for row in rows] == ["incorrect"] * 3
    assert all(0 <= row["reward"] < 1 and "source_dataset" in row["answer"] for row in rows)


def test_an_llm_judge_scores_by_one_rubric(tiny_folder: Path, problems: Path, tmp_path: Path) -> None:
    with scripted(says("SCORE: 10"), says("SCORE: 10"), says("Half.\nSCORE: 5")) as server:
        given = ["--set", "task.grader=llm_judge", "--set", "verifier.llm_judge.model=judge"]
        given += ["--set", f"verifier.llm_judge.url={server.url}", "--limit", "3", "--file", str(problems)]
        given += ["--dtype", "float32", "--max-new-tokens", "4", "--output", str(tmp_path / "eval")]
        result = lockstep("eval", str(tiny_folder), *given)
        assert result.exit_code == 0, result.output
        assert "gave 10, from 0 to 10, to a right answer of 2 + 2" in result.stderr
        other = lockstep("eval", str(tiny_folder), *given, "--set", "verifier.llm_judge.rubric=Is {completion} short?")
    rows = lines(tmp_path / "eval" / "completions.jsonl")
    assert sorted(row["reward"] for row in rows) == [0.5, 0.5, 1.0]
    assert {row["reason"] for row in rows} == {"", "LLM judge: Half."}
    assert other.exit_code == 2
    assert "was begun with llm_judge.rubric=" in other.stderr


def test_programs_are_judged_by_their_tests(tiny_folder: Path, tmp_path: Path) -> None:
    row = {
        "text": "Write f.",
        "code": "def f():\n    return 1",
        "test_list": ["assert f() == 1"],
        "test_setup_code": "",
    }
    (tmp_path / "code.jsonl").write_text(json.dumps(row) + "\n")
    short = ["--dtype", "float32", "--max-new-tokens", "4", "--output", str(tmp_path / "eval")]
    result = lockstep("eval", str(tiny_folder), "--task", "mbpp", "--file", str(tmp_path / "code.jsonl"), *short)
    assert result.exit_code == 0, result.output
    assert "code sandbox: " in result.stderr
    (answer,) = lines(tmp_path / "eval" / "completions.jsonl")
    assert answer["outcome"] == "incorrect"
    assert "assert f() == 1" in answer["prompt"]


def test_of_a_mixture_one_task_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.toml"
    recipe.write_text('[[tasks]]\nname = "a"\n[[tasks]]\nname = "b"\n')
    said = refused("eval", "nowhere", "--task", str(recipe))
    assert said.endswith("mixed.toml is a mixture of 2 tasks: give --name with one of a, b\n")
    said = refused("eval", "nowhere", "--task", "quickstart", "--name", "a")
    assert said.endswith("--name a is of a recipe with several tasks, which quickstart is not: leave it out\n")
